#!/bin/busybox sh
# SPDX-License-Identifier: GPL-2.0-or-later
# First process of the virtual machine. The host's root arrives read-only over 9p and gets a layer of memory on top; the
# job directory is shared for writing: job/command is run, its output goes to job/output, its exit status to job/status.
# What is said on the console only matters when something fails.
export PATH=/bin:/sbin
/bin/busybox mkdir -p /bin /proc /sys /host /layer /root
/bin/busybox --install -s /bin

end() {
    echo "vm: $*"
    sync
    reboot -f # the machine is started so that this ends it
}
attach() { # tag, directory, options
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$3" "$1" "$2" || end "cannot mount $1"
}

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in $(cat /modules/order); do
    insmod "/modules/$module" || end "cannot load $module"
done

attach host /host ro,cache=loose
mount -t tmpfs -o size=75% layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work root /root || end "cannot make the root"
for directory in proc sys dev; do
    mount --move "/$directory" "/root/$directory"
done
mkdir -p /root/dev/shm /root/dev/pts
mount -t devpts devpts /root/dev/pts
for directory in dev/shm run; do # /tmp stays: what is worked on may be there
    mount -t tmpfs tmpfs "/root/$directory"
done
mkdir /root/run/job /root/run/lock /root/run/tmp
chmod 1777 /root/dev/shm /root/run/tmp
attach job /root/run/job rw,cache=none

hostname vm
ip link set lo up
chroot /root /bin/bash /run/job/guest </root/dev/null >/root/run/job/output 2>&1
echo $? >/root/run/job/status.new
mv /root/run/job/status.new /root/run/job/status
end done
