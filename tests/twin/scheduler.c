/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The loop of an lcore (DPVS src/scheduler.c): registered jobs, over and over. The twin alone sleeps after a row of
 * rounds in which nothing was done, so that two nodes fit on two cores; TWIN_POLL=1 or the command "poll on" makes it
 * spin as DPVS.
 */
#include <unistd.h>

#include <rte_launch.h>

#include "twin.h"

#define IDLE_ROUNDS 50
#define WORKER_SLEEP_US 150
#define MASTER_SLEEP_US 500

RTE_DEFINE_PER_LCORE(struct lcore_stats, twin_stats);

static struct list_head jobs[LCORE_ROLE_MAX][LCORE_JOB_TYPE_MAX];

int scheduler_init(void)
{
    for (int role = 0; role < LCORE_ROLE_MAX; role++)
        for (int type = 0; type < LCORE_JOB_TYPE_MAX; type++)
            INIT_LIST_HEAD(&jobs[role][type]);
    return EDPVS_OK;
}

void dpvs_lcore_job_init(struct dpvs_lcore_job *job, char *name, dpvs_lcore_job_t type, void (*func)(void *arg),
                         uint32_t skip_loops)
{
    if (!job)
        return;
    snprintf(job->name, sizeof(job->name), "%s", name);
    job->type = type;
    job->func = func;
    job->skip_loops = skip_loops;
}

static bool registered(const struct dpvs_lcore_job *job, dpvs_lcore_role_t role)
{
    const struct dpvs_lcore_job *other;

    list_for_each_entry (other, &jobs[role][job->type], list) {
        if (other == job)
            return true;
    }
    return false;
}

int dpvs_lcore_job_register(struct dpvs_lcore_job *job, dpvs_lcore_role_t role)
{
    if (!job || role >= LCORE_ROLE_MAX || (job->type == LCORE_JOB_SLOW && job->skip_loops == 0))
        return EDPVS_INVAL;
    if (registered(job, role))
        return EDPVS_EXIST;
    list_add_tail(&job->list, &jobs[role][job->type]);
    return EDPVS_OK;
}

int dpvs_lcore_job_unregister(struct dpvs_lcore_job *job, dpvs_lcore_role_t role)
{
    if (!job || role >= LCORE_ROLE_MAX)
        return EDPVS_INVAL;
    if (!registered(job, role))
        return EDPVS_NOTEXIST;
    list_del_init(&job->list);
    return EDPVS_OK;
}

void netif_get_slave_lcores(uint8_t *nb, uint64_t *mask)
{
    if (nb)
        *nb = g_slave_lcore_num;
    if (mask)
        *mask = g_slave_lcore_mask;
}

bool netif_lcore_is_fwd_worker(lcoreid_t cid)
{
    return cid < DPVS_MAX_LCORE && g_lcore_role[cid] == LCORE_ROLE_FWD_WORKER;
}

void twin_set_poll(bool poll)
{
    __atomic_store_n(&twin_conf.poll, poll, __ATOMIC_RELAXED);
}

static int job_loop(void *arg __rte_unused)
{
    dpvs_lcore_role_t role = g_lcore_role[rte_lcore_id()];
    struct lcore_stats *stats = this_stats;
    const useconds_t nap = role == LCORE_ROLE_MASTER ? MASTER_SLEEP_US : WORKER_SLEEP_US;
    struct dpvs_lcore_job *job;
    uint32_t round = 0, idle = 0;
    uint64_t began;

    if (role == LCORE_ROLE_IDLE)
        return EDPVS_IDLE;
    LOG(INFO, "lcore %02u enter %s loop\n", rte_lcore_id(), role == LCORE_ROLE_MASTER ? "master" : "worker");
    list_for_each_entry (job, &jobs[role][LCORE_JOB_INIT], list)
        job->func(job->data);

    began = rte_get_timer_cycles();
    while (dpvs_state_get() != DPVS_STATE_FINISH) {
        uint64_t work = stats->work, now;

        round++;
        list_for_each_entry (job, &jobs[role][LCORE_JOB_LOOP], list)
            job->func(job->data);
        list_for_each_entry (job, &jobs[role][LCORE_JOB_SLOW], list) {
            if (round % job->skip_loops == 0)
                job->func(job->data);
        }
        now = rte_get_timer_cycles();
        stats->longest_round = stats->longest_round == UINT64_MAX ? 0 : RTE_MAX(stats->longest_round, now - began);
        began = now;
        idle = stats->work == work ? idle + 1 : 0;
        if (idle > IDLE_ROUNDS && !__atomic_load_n(&twin_conf.poll, __ATOMIC_RELAXED)) {
            usleep(nap);
            began = rte_get_timer_cycles();
        }
    }
    return EDPVS_OK;
}

int dpvs_lcore_start(int is_master)
{
    return is_master ? job_loop(NULL) : rte_eal_mp_remote_launch(job_loop, NULL, SKIP_MAIN);
}
