#!/bin/bash
# The UML kernel's first program. Its root is the host's file system, read-only: put a layer over it that
# takes the lab's writes, and go on there with inside.sh.
set -eu
host=${0%/*} # the folder that common.sh calls `run`

mount -t tmpfs tmpfs /run
mkdir -p /run/upper /run/work /run/root
mount -t overlay -o lowerdir=/,upperdir=/run/upper,workdir=/run/work overlay /run/root
cd /run/root
mount -t tmpfs tmpfs run
mkdir -p run/lab/host run/lab/old
mount -t hostfs -o "$host" none run/lab/host
pivot_root . run/lab/old
exec chroot . /bin/bash /run/lab/host/inside.sh
