#!/bin/busybox sh
# shellcheck shell=dash
# The guest's first program, in its initramfs: devices, network, the data disk if the machine has one, the load.
busybox=/bin/busybox
$busybox mount -t proc proc /proc
$busybox mount -t sysfs sysfs /sys
$busybox mount -t devtmpfs devtmpfs /dev
for module in /modules/*; do
    $busybox insmod "$module"
done

# What is typed is not printed again.
$busybox stty -echo <&1
$busybox ifconfig lo 127.0.0.1 up
if [ -e /sys/class/net/eth0 ]; then
    for word in $($busybox cat /proc/cmdline); do
        case $word in
            sterna.address=*) $busybox ifconfig eth0 "${word#*=}" netmask 255.255.255.0 up ;;
        esac
    done
fi

folder=
if [ -b /dev/vda ]; then
    $busybox mount -t ext4 /dev/vda /data && folder=/data
fi
# shellcheck disable=SC2086 # no argument without a disk
/bin/load $folder
echo "load: ended with code $?"
[ ! "$folder" ] || { $busybox umount /data && echo "load: disk unmounted"; }
$busybox poweroff -f
