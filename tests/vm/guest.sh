# SPDX-License-Identifier: GPL-2.0-or-later
# Run by bash in the guest, on the host's root: one soft-RoCE device, then the command in the variables that follow.
# Both ends of a connection use this device: rxe does not work across network namespaces.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
export TMPDIR=/run/tmp # not /tmp, which begins with all that the host has there
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
ulimit -l unlimited
ulimit -n 65536

soft_roce() {
    ip link add roce0 type dummy && ip link set roce0 mtu 4200 up && ip address add 10.90.0.1/24 dev roce0 || return
    rdma link add rxe0 type rxe netdev roce0 || return
    for _ in $(seq 50); do # the address becomes a GID a moment later
        grep -qs 'ffff:0a5a:0001' /sys/class/infiniband/rxe0/ports/1/gids/* && return
        sleep 0.1
    done
    echo 'the address of roce0 did not become a GID' >&2
    return 1
}

soft_roce || exit 125
