/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * dpvs.conf: sections "name {" ... "}" and lines "key value", each perhaps marked <init>. Only the keys the twin needs
 * are read; all others are passed over. Keys marked "first" count at the start alone, the rest again at SIGHUP, as in
 * DPVS.
 */
#include <ctype.h>
#include <stdlib.h>
#include <strings.h>

#include "twin.h"

#define MAX_DEPTH 16

struct twin_conf twin_conf = {
    .rx_queues = 1,
    .conn_pool_size = 2097151,
    .conn_pool_cache = 256,
    .conn_init_timeout = 3,
    .schedule_interval_us = 10,
    .msg_ring_size = 4096,
    .msg_timeout_us = 2000,
    .sa_hash_size = 16,
};

int twin_tcp_timeouts[DPVS_TCP_S_LAST + 1] = {2, 90, 3, 30, 7, 7, 3, 7, 7, 120, 30, 2};
#ifdef TWIN_BEFORE_1_9_6
int twin_udp_timeouts[DPVS_UDP_S_LAST + 1] = {300, 2};
#else
int twin_udp_timeouts[DPVS_UDP_S_LAST + 1] = {2, 300, 300, 2};
#endif

static const char *const tcp_keys[] = {"none",  "established", "syn_sent", "syn_recv", "fin_wait", "time_wait",
                                       "close", "close_wait",  "last_ack", "listen",   "synack",   "last"};
#ifdef TWIN_BEFORE_1_9_6
static const char *const udp_keys[] = {"normal", "last"};
#else
static const char *const udp_keys[] = {"none", "oneway", "normal", "last"};
#endif

static void timeout_key(const char *key, const char *value, const char *const *names, int *table, int count)
{
    for (int i = 0; i < count; i++)
        if (!strcmp(key, names[i]) && atoi(value) > 0)
            table[i] = atoi(value);
}

/* DPVS rounds the size of the pool to 2^n - 1 and refuses fewer than 65536 (src/ipvs/ip_vs_conn.c). */
static void pool_size_key(const char *value)
{
    int size = atoi(value);

    if (size < 65536)
        return;
    is_power2(size, 1, &size);
    twin_conf.conn_pool_size = size - 1;
}

static void worker_key(const char *key, const char *value)
{
    struct twin_worker_conf *worker = &twin_conf.workers[twin_conf.nworkers - 1];

    if (!strcmp(key, "type"))
        worker->slave = !strcmp(value, "slave");
    else if (!strcmp(key, "cpu_id"))
        worker->cid = (lcoreid_t)atoi(value);
    else if (!strcmp(key, "rx_queue_ids"))
        worker->queue = atoi(value);
}

static void on_key(char path[][64], int depth, const char *key, const char *value, bool first)
{
    const char *top = depth > 0 ? path[0] : "", *second = depth > 1 ? path[1] : "", *third = depth > 2 ? path[2] : "";

    if (!strcmp(top, "ipvs_defs") && !strcmp(second, "tcp") && !strcmp(third, "timeout"))
        timeout_key(key, value, tcp_keys, twin_tcp_timeouts, DPVS_TCP_S_LAST + 1);
    else if (!strcmp(top, "ipvs_defs") && !strcmp(second, "udp") && !strcmp(third, "timeout"))
        timeout_key(key, value, udp_keys, twin_udp_timeouts, DPVS_UDP_S_LAST + 1);
    else if (!strcmp(top, "ipvs_defs") && !strcmp(key, "conn_init_timeout") && atoi(value) > 0)
        twin_conf.conn_init_timeout = atoi(value);
    else if (!strcmp(top, "timer_defs") && !strcmp(key, "schedule_interval") && atoi(value) > 0)
        twin_conf.schedule_interval_us = atoi(value);
    else if (!strcmp(top, "ctrl_defs") && !strcmp(key, "sync_msg_timeout_us") && atoi(value) > 0)
        twin_conf.msg_timeout_us = atoi(value);
    else if (!first)
        return;
    else if (!strcmp(top, "worker_defs") && twin_conf.nworkers > 0)
        worker_key(key, value);
    else if (!strcmp(top, "netif_defs") && !strcmp(key, "queue_number") && !strcmp(third, "rx"))
        twin_conf.rx_queues = atoi(value);
    else if (!strcmp(top, "ipvs_defs") && !strcmp(key, "conn_pool_size"))
        pool_size_key(value);
    else if (!strcmp(top, "ipvs_defs") && !strcmp(key, "conn_pool_cache") && atoi(value) > 0)
        is_power2(atoi(value), 0, &twin_conf.conn_pool_cache);
    else if (!strcmp(top, "ipvs_defs") && !strcmp(key, "redirect"))
        twin_conf.redirect = !strcasecmp(value, "on");
    else if (!strcmp(top, "ctrl_defs") && !strcmp(key, "ring_size") && atoi(value) >= 256)
        is_power2(atoi(value), 0, &twin_conf.msg_ring_size);
    else if (!strcmp(top, "sa_pool") && !strcmp(key, "pool_hash_size") && atoi(value) >= 1 && atoi(value) <= 128)
        twin_conf.sa_hash_size = atoi(value);
    else if (!strcmp(top, "global_defs") && !strcmp(key, "log_file"))
        snprintf(twin_conf.log_file, sizeof(twin_conf.log_file), "%s", value);
}

static void on_section(const char *name, int depth, char path[][64], bool first)
{
    if (first && depth == 1 && !strcmp(path[0], "worker_defs") && !strncmp(name, "worker", 6) &&
        twin_conf.nworkers < DPVS_MAX_LCORE)
        twin_conf.nworkers++;
}

int conf_load(const char *path, bool first)
{
    char line[512], stack[MAX_DEPTH][64];
    int depth = 0;
    FILE *file = fopen(path, "r");

    if (!file) {
        fprintf(stderr, "cannot open %s: %m\n", path);
        return EDPVS_SYSCALL;
    }
    while (fgets(line, sizeof(line), file)) {
        char *words[8], *save = NULL;
        int n = 0;

        line[strcspn(line, "!#\n")] = '\0';
        for (char *w = strtok_r(line, " \t", &save); w && n < 8; w = strtok_r(NULL, " \t", &save))
            if (strcmp(w, "<init>") != 0)
                words[n++] = w;
        if (n == 0)
            continue;
        if (!strcmp(words[0], "}")) {
            depth = RTE_MAX(depth - 1, 0);
        } else if (!strcmp(words[n - 1], "{") && depth < MAX_DEPTH) {
            on_section(words[0], depth, stack, first);
            snprintf(stack[depth++], sizeof(stack[0]), "%s", words[0]);
        } else {
            on_key(stack, depth, words[0], n > 1 ? words[1] : "", first);
        }
    }
    fclose(file);
    return EDPVS_OK;
}
