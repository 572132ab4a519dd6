#!/bin/busybox sh
# shellcheck shell=dash disable=SC2086 # $share is several words
# The VM kernel's first program, in its initramfs: mounts the host's file system read-only, puts a layer over it that
# takes the lab's writes, and goes on there with inside.sh.
set -eu
busybox=/bin/busybox
share="-t 9p -o trans=virtio,version=9p2000.L,msize=512000"

$busybox mount -t proc proc /proc
for module in /modules/*; do
    $busybox insmod "$module"
done
# Nobody changes these files while the lab runs, so they may be cached without asking.
$busybox mount $share,cache=loose,ro root /lower
$busybox mount -t tmpfs tmpfs /layer
$busybox mkdir /layer/upper /layer/work
$busybox mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work overlay /root
$busybox mount -t tmpfs tmpfs /root/run
$busybox mkdir -p /root/run/lab/host
$busybox mount $share lab /root/run/lab/host
$busybox umount /proc
exec $busybox switch_root /root /bin/bash /run/lab/host/inside.sh
