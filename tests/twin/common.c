/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Small things that DPVS keeps in src/common.c and src/global_data.c. */
#include <errno.h>
#include <numa.h>
#include <unistd.h>

#include "twin.h"

char *dpvs_pid_file;
char *dpvs_ipc_file;
char *dpvs_conf_file;
unsigned int g_version;
uint64_t g_cycles_per_sec;
dpvs_lcore_role_t g_lcore_role[DPVS_MAX_LCORE];
int g_lcore_index2id[DPVS_MAX_LCORE];
int g_lcore_id2index[DPVS_MAX_LCORE];
int g_lcore_num;
lcoreid_t g_master_lcore_id;
uint8_t g_slave_lcore_num;
uint64_t g_slave_lcore_mask;

static volatile dpvs_state_t state = DPVS_STATE_STOP;

void dpvs_state_set(dpvs_state_t value)
{
    state = value;
}

dpvs_state_t dpvs_state_get(void)
{
    return state;
}

const char *dpvs_strerror(int err)
{
    /* Indexed by -err; the texts are part of the control socket's replies. */
    static const char *const texts[] = {
        "OK",
        "invalid parameter",
        "no memory",
        "already exist",
        "not exist",
        "invalid packet",
        "packet dropped",
        "no protocol",
        "no route",
        "defragment error",
        "fragment error",
        "failed dpdk api",
        "nothing to do",
        "resource busy",
        "not support",
        "no resource",
        "overloaded",
        "no service",
        "disabled",
        "no room",
        "non-EAL thread lcore",
        "callback failed",
        "I/O error",
        "msg callback failed",
        "msg dropped",
        "stolen packet",
        "system call failed",
        "no such device",
    };

    if (err == EDPVS_KNICONTINUE)
        return "kni to continue";
    if (err == EDPVS_INPROGRESS)
        return "in progress";
    if (err > 0 || -err >= (int)RTE_DIM(texts))
        return "<unknow>";
    return texts[-err];
}

int get_numa_nodes(void)
{
    return numa_available() < 0 ? 1 : numa_max_node() + 1;
}

/* Is num + offset a power of two; `lower` is the largest power of two not above it (num itself below 2). */
bool is_power2(int num, int offset, int *lower)
{
    int sum = num + offset;

    if (num < 2 || sum < 2) {
        *lower = num;
        return false;
    }
    *lower = 1 << (31 - __builtin_clz((unsigned)sum));
    return *lower == sum;
}

ssize_t readn(int fd, void *buf, size_t n)
{
    size_t done = 0;

    while (done < n) {
        ssize_t got = read(fd, (char *)buf + done, n - done);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return -1;
        if (got == 0)
            break;
        done += (size_t)got;
    }
    return (ssize_t)done;
}

ssize_t sendn(int fd, const void *buf, size_t n, int flags)
{
    size_t done = 0;

    while (done < n) {
        ssize_t sent = send(fd, (const char *)buf + done, n - done, flags);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0)
            return -1;
        done += (size_t)sent;
    }
    return (ssize_t)done;
}
