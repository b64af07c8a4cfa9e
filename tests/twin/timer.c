/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * DPVS's timers (src/timer.c): two wheels of 2^19 slots, one scheduler a worker and one, locked, for the whole process
 * on the master. A periodic rte_timer moves a scheduler by one tick of 1 ms. A late lcore runs one tick per call of
 * rte_timer_manage(), so on a starved CPU the wheel falls behind the clock and then catches up, as DPVS's does.
 */
#include <stdlib.h>

#include <rte_timer.h>

#include "twin.h"

#define TICK_HZ 1000
#define WHEEL_SLOTS (2 << 18)
#define WHEELS 2
#define MAX_TICKS 0xffffffffu
#define MAX_SECS (MAX_TICKS / TICK_HZ)

struct timer_scheduler {
    rte_spinlock_t lock;
    uint32_t cursors[WHEELS];
    struct list_head *hashs[WHEELS];
    struct rte_timer rte_tim;
    uint64_t ticks;
};

static RTE_DEFINE_PER_LCORE(struct timer_scheduler, timer_sched);
static struct timer_scheduler g_timer_sched;

/* Ticks that one slot of a wheel stands for. */
static const uint32_t slot_ticks[WHEELS] = {1, WHEEL_SLOTS};

static void lock(struct timer_scheduler *sched)
{
    if (sched == &g_timer_sched)
        rte_spinlock_lock(&sched->lock);
}

static void unlock(struct timer_scheduler *sched)
{
    if (sched == &g_timer_sched)
        rte_spinlock_unlock(&sched->lock);
}

static bool pending(const struct dpvs_timer *timer)
{
    const struct list_head *prev = timer->list.prev;
    return prev && prev != LIST_POISON2 && prev != &timer->list;
}

dpvs_tick_t timeval_to_ticks(const struct timeval *tv)
{
    uint64_t ticks = (uint64_t)tv->tv_sec * TICK_HZ + (uint64_t)tv->tv_usec * TICK_HZ / 1000000;
    return ticks >= MAX_TICKS ? MAX_TICKS : (dpvs_tick_t)ticks;
}

void ticks_to_timeval(const dpvs_tick_t ticks, struct timeval *tv)
{
    tv->tv_sec = ticks / TICK_HZ;
    tv->tv_usec = ticks % TICK_HZ * (1000000 / TICK_HZ);
}

static struct list_head *slot_ahead(struct timer_scheduler *sched, int wheel, uint32_t steps)
{
    return &sched->hashs[wheel][(sched->cursors[wheel] + steps) % WHEEL_SLOTS];
}

/* Put a timer on the highest wheel its delay reaches; `left` is what remains when that slot comes up. */
static int arm(struct timer_scheduler *sched, struct dpvs_timer *timer, struct timeval *delay, dpvs_timer_cb_t handler,
               void *arg, bool period)
{
    assert(timer && delay && handler);
    if (pending(timer))
        LOG(WARNING, "schedule a pending timer ?\n");

    timer->handler = handler;
    timer->priv = arg;
    timer->is_period = period;
    timer->delay = timeval_to_ticks(delay);
    if (timer->delay >= MAX_TICKS) {
        LOG(WARNING, "exceed timer range\n");
        return EDPVS_INVAL;
    }
    if (timer->delay == 0) {
        LOG(INFO, "trigger 0 delay timer at next tick.\n");
        timer->delay = 1;
    }

    if (timer->delay >= WHEEL_SLOTS) {
        list_add_tail(&timer->list, slot_ahead(sched, 1, timer->delay / WHEEL_SLOTS));
        timer->left = timer->delay % WHEEL_SLOTS + sched->cursors[0];
    } else {
        list_add_tail(&timer->list, slot_ahead(sched, 0, timer->delay));
        timer->left = 0;
    }
    return EDPVS_OK;
}

static void disarm(struct dpvs_timer *timer)
{
    if (pending(timer))
        list_del(&timer->list);
}

static int rearm(struct timer_scheduler *sched, struct dpvs_timer *timer, struct timeval *delay)
{
    disarm(timer);
    return arm(sched, timer, delay, timer->handler, timer->priv, timer->is_period);
}

/* The handler may free the timer: nothing of it is read after an answer other than "periodic, go on". */
static void fire(struct timer_scheduler *sched, struct dpvs_timer *timer)
{
    struct timeval delay;

    assert(timer->handler);
    disarm(timer);
    if (timer->handler(timer->priv) != DTIMER_OK || !timer->is_period)
        return;
    ticks_to_timeval(timer->delay, &delay);
    if (arm(sched, timer, &delay, timer->handler, timer->priv, true) != EDPVS_OK)
        LOG(ERR, "%s: fail to re-schedule\n", __func__);
}

/* A timer whose slot of the high wheel is up moves to the low wheel for its last ticks. */
static void descend(struct timer_scheduler *sched, struct dpvs_timer *timer, int wheel)
{
    list_del(&timer->list);
    for (int lower = wheel; lower >= 0; lower--) {
        uint32_t steps = timer->left / slot_ticks[lower];
        if (steps == 0)
            continue;
        list_add_tail(&timer->list, slot_ahead(sched, lower, steps));
        timer->left %= slot_ticks[lower];
        return;
    }
}

static void tick(struct rte_timer *tim __rte_unused, void *arg)
{
    struct timer_scheduler *sched = arg;

    lock(sched);
    sched->ticks++;
    for (int wheel = 0; wheel < WHEELS; wheel++) {
        bool carry = ++sched->cursors[wheel] == WHEEL_SLOTS;
        struct list_head *due;

        if (carry)
            sched->cursors[wheel] = 0;
        due = &sched->hashs[wheel][sched->cursors[wheel]];
        while (!list_empty(due)) {
            struct dpvs_timer *timer = list_entry(due->next, struct dpvs_timer, list);
            if (timer->left == 0)
                fire(sched, timer);
            else
                descend(sched, timer, wheel);
        }
        if (!carry)
            break;
    }
    unlock(sched);
}

static int scheduler_setup(struct timer_scheduler *sched, unsigned lcore)
{
    rte_spinlock_init(&sched->lock);
    for (int wheel = 0; wheel < WHEELS; wheel++) {
        sched->hashs[wheel] = rte_malloc(NULL, sizeof(struct list_head) * WHEEL_SLOTS, 0);
        if (!sched->hashs[wheel])
            return EDPVS_NOMEM;
        for (int slot = 0; slot < WHEEL_SLOTS; slot++)
            INIT_LIST_HEAD(&sched->hashs[wheel][slot]);
    }
    rte_timer_init(&sched->rte_tim);
    if (rte_timer_reset(&sched->rte_tim, g_cycles_per_sec / TICK_HZ, PERIODICAL, lcore, tick, sched) != 0)
        return EDPVS_INVAL;
    return EDPVS_OK;
}

static int setup_worker(void *arg __rte_unused)
{
    return scheduler_setup(&RTE_PER_LCORE(timer_sched), rte_lcore_id());
}

int dpvs_timer_init(void)
{
    unsigned lcore;

    rte_timer_subsystem_init();
    rte_eal_mp_remote_launch(setup_worker, NULL, SKIP_MAIN);
    RTE_LCORE_FOREACH_WORKER (lcore) {
        int err = rte_eal_wait_lcore(lcore);
        if (err < 0)
            return err;
    }
    return scheduler_setup(&g_timer_sched, rte_get_main_lcore());
}

uint64_t twin_ticks(void)
{
    return on_master() ? g_timer_sched.ticks : RTE_PER_LCORE(timer_sched).ticks;
}

int dpvs_timer_sched_interval_get(void)
{
    return twin_conf.schedule_interval_us;
}

/* Workers may use both schedulers, the master only the global one. */
static struct timer_scheduler *scheduler_of(bool global)
{
    if (global)
        return &g_timer_sched;
    if (on_master()) {
        LOG(ERR, "try get per-lcore timer from master\n");
        return NULL;
    }
    return &RTE_PER_LCORE(timer_sched);
}

static int start(struct dpvs_timer *timer, struct timeval *delay, dpvs_timer_cb_t handler, void *arg, bool global,
                 bool period, bool locked)
{
    struct timer_scheduler *sched = scheduler_of(global);
    int err;

    if (!sched || !timer || !delay || !handler || delay->tv_sec >= MAX_SECS)
        return EDPVS_INVAL;
    if (locked)
        lock(sched);
    err = arm(sched, timer, delay, handler, arg, period);
    if (locked)
        unlock(sched);
    return err;
}

int dpvs_timer_sched_nolock(struct dpvs_timer *timer, struct timeval *delay, dpvs_timer_cb_t handler, void *arg,
                            bool global)
{
    return start(timer, delay, handler, arg, global, false, false);
}

int dpvs_timer_sched(struct dpvs_timer *timer, struct timeval *delay, dpvs_timer_cb_t handler, void *arg, bool global)
{
    return start(timer, delay, handler, arg, global, false, true);
}

int dpvs_timer_sched_period_nolock(struct dpvs_timer *timer, struct timeval *intv, dpvs_timer_cb_t handler, void *arg,
                                   bool global)
{
    return start(timer, intv, handler, arg, global, true, false);
}

int dpvs_timer_sched_period(struct dpvs_timer *timer, struct timeval *intv, dpvs_timer_cb_t handler, void *arg,
                            bool global)
{
    return start(timer, intv, handler, arg, global, true, true);
}

static void now_of(const struct timer_scheduler *sched, struct timeval *now)
{
    ticks_to_timeval(sched->cursors[1] * WHEEL_SLOTS + sched->cursors[0], now);
}

int dpvs_timer_sched_abs_nolock(struct dpvs_timer *timer, struct timeval *expire, dpvs_timer_cb_t handler, void *arg,
                                bool global)
{
    struct timer_scheduler *sched = scheduler_of(global);
    struct timeval now, delta;

    if (!sched || !timer || !expire || !handler)
        return EDPVS_INVAL;
    now_of(sched, &now);
    if (!timercmp(expire, &now, >)) {
        handler(arg); /* already due: run it here */
        return EDPVS_OK;
    }
    timersub(expire, &now, &delta);
    if (delta.tv_sec >= MAX_SECS)
        return EDPVS_INVAL;
    return arm(sched, timer, &delta, handler, arg, false);
}

int dpvs_timer_sched_abs(struct dpvs_timer *timer, struct timeval *expire, dpvs_timer_cb_t handler, void *arg,
                         bool global)
{
    struct timer_scheduler *sched = scheduler_of(global);
    int err;

    if (!sched)
        return EDPVS_INVAL;
    lock(sched);
    err = dpvs_timer_sched_abs_nolock(timer, expire, handler, arg, global);
    unlock(sched);
    return err;
}

int dpvs_timer_cancel_nolock(struct dpvs_timer *timer, bool global)
{
    if (!scheduler_of(global) || !timer)
        return EDPVS_INVAL;
    disarm(timer);
    return EDPVS_OK;
}

int dpvs_timer_cancel(struct dpvs_timer *timer, bool global)
{
    struct timer_scheduler *sched = scheduler_of(global);

    if (!sched || !timer)
        return EDPVS_INVAL;
    lock(sched);
    disarm(timer);
    unlock(sched);
    return EDPVS_OK;
}

int dpvs_timer_update_nolock(struct dpvs_timer *timer, struct timeval *delay, bool global)
{
    struct timer_scheduler *sched = scheduler_of(global);

    if (!sched || !timer || !delay)
        return EDPVS_INVAL;
    return rearm(sched, timer, delay);
}

int dpvs_timer_update(struct dpvs_timer *timer, struct timeval *delay, bool global)
{
    struct timer_scheduler *sched = scheduler_of(global);
    int err;

    if (!sched || !timer || !delay)
        return EDPVS_INVAL;
    lock(sched);
    err = rearm(sched, timer, delay);
    unlock(sched);
    return err;
}

int dpvs_timer_reset_nolock(struct dpvs_timer *timer, bool global)
{
    struct timeval delay;

    if (!timer)
        return EDPVS_INVAL;
    ticks_to_timeval(timer->delay, &delay);
    return dpvs_timer_update_nolock(timer, &delay, global);
}

int dpvs_timer_reset(struct dpvs_timer *timer, bool global)
{
    struct timeval delay;

    if (!timer)
        return EDPVS_INVAL;
    ticks_to_timeval(timer->delay, &delay);
    return dpvs_timer_update(timer, &delay, global);
}

int dpvs_time_now_nolock(struct timeval *now, bool global)
{
    struct timer_scheduler *sched = scheduler_of(global);

    if (!sched || !now)
        return EDPVS_INVAL;
    now_of(sched, now);
    return EDPVS_OK;
}

int dpvs_time_now(struct timeval *now, bool global)
{
    struct timer_scheduler *sched = scheduler_of(global);

    if (!sched || !now)
        return EDPVS_INVAL;
    lock(sched);
    now_of(sched, now);
    unlock(sched);
    return EDPVS_OK;
}

void dpvs_time_rand_delay(struct timeval *tv, long delay_us)
{
    uint64_t us;

    assert(delay_us > 0);
    us = (uint64_t)tv->tv_sec * 1000000 + (uint64_t)tv->tv_usec + (uint64_t)(lrand48() % delay_us);
    tv->tv_sec = us / 1000000;
    tv->tv_usec = us % 1000000;
}
