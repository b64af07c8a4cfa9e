/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Messages between lcores (DPVS src/ctrl.c): a ring for each lcore, callbacks by type and lcore. A unicast message runs
 * its callback on the target; a multicast one goes from the master to all workers, whose answers come back as unicast
 * messages of the same type and sequence number. Whoever holds a message holds a reference; the last one frees it.
 */
#include <rte_ring.h>
#include <rte_rwlock.h>

#include "mempool.h"
#include "twin.h"

#define TYPE_BUCKETS 256
#define MC_BUCKETS 256

static struct list_head types[DPVS_MAX_LCORE][TYPE_BUCKETS];
static rte_rwlock_t type_locks[DPVS_MAX_LCORE][TYPE_BUCKETS];
static struct list_head mc_waiting[MC_BUCKETS];
static struct rte_ring *rings[DPVS_MAX_LCORE];
static lcoreid_t master;

static void flags_add(struct dpvs_msg *msg, uint32_t flags)
{
    rte_spinlock_lock(&msg->lock);
    msg->flags |= flags;
    rte_spinlock_unlock(&msg->lock);
}

static uint32_t flags_get(struct dpvs_msg *msg)
{
    uint32_t flags;

    rte_spinlock_lock(&msg->lock);
    flags = msg->flags;
    rte_spinlock_unlock(&msg->lock);
    return flags;
}

static bool is_worker(lcoreid_t cid)
{
    return cid < DPVS_MAX_LCORE && (g_slave_lcore_mask & (UINT64_C(1) << cid));
}

/* Types: looked up under a read lock, held by a count while their callback runs. */

static struct dpvs_msg_type *type_get(msgid_t type, lcoreid_t cid)
{
    unsigned bucket = type % TYPE_BUCKETS;
    struct dpvs_msg_type *found = NULL, *mt;

    if (cid >= DPVS_MAX_LCORE)
        return NULL;
    rte_rwlock_read_lock(&type_locks[cid][bucket]);
    list_for_each_entry (mt, &types[cid][bucket], list) {
        if (mt->type == type) {
            rte_atomic32_inc(&mt->refcnt);
            found = mt;
            break;
        }
    }
    rte_rwlock_read_unlock(&type_locks[cid][bucket]);
    return found;
}

static void type_put(struct dpvs_msg_type *mt)
{
    if (mt)
        rte_atomic32_dec(&mt->refcnt);
}

int msg_type_register(const struct dpvs_msg_type *msg_type)
{
    struct dpvs_msg_type *mt;
    unsigned bucket;

    if (!msg_type || msg_type->cid >= DPVS_MAX_LCORE)
        return EDPVS_INVAL;
    mt = type_get(msg_type->type, msg_type->cid);
    if (mt) {
        LOG(WARNING, "%s: msg type %u already registered on lcore %u\n", __func__, mt->type, mt->cid);
        type_put(mt);
        return EDPVS_EXIST;
    }
    mt = rte_zmalloc("msg_type", sizeof(*mt), RTE_CACHE_LINE_SIZE);
    if (!mt)
        return EDPVS_NOMEM;
    *mt = *msg_type;
    rte_atomic32_set(&mt->refcnt, 0);
    bucket = mt->type % TYPE_BUCKETS;
    rte_rwlock_write_lock(&type_locks[mt->cid][bucket]);
    list_add_tail(&mt->list, &types[mt->cid][bucket]);
    rte_rwlock_write_unlock(&type_locks[mt->cid][bucket]);
    return EDPVS_OK;
}

int msg_type_unregister(const struct dpvs_msg_type *msg_type)
{
    struct dpvs_msg_type *mt;
    unsigned bucket;

    if (!msg_type || msg_type->cid >= DPVS_MAX_LCORE)
        return EDPVS_INVAL;
    mt = type_get(msg_type->type, msg_type->cid);
    if (!mt)
        return EDPVS_NOTEXIST;
    bucket = mt->type % TYPE_BUCKETS;
    rte_rwlock_write_lock(&type_locks[mt->cid][bucket]);
    list_del_init(&mt->list);
    rte_rwlock_write_unlock(&type_locks[mt->cid][bucket]);
    type_put(mt);
    while (rte_atomic32_read(&mt->refcnt) > 0)
        rte_pause();
    rte_free(mt);
    return EDPVS_OK;
}

static int multicast_done(struct dpvs_multicast_queue *mcq __rte_unused)
{
    return EDPVS_OK;
}

static int each_lcore(const struct dpvs_msg_type *msg_type, int (*apply)(const struct dpvs_msg_type *))
{
    if (!msg_type)
        return EDPVS_INVAL;
    for (unsigned cid = 0; cid < DPVS_MAX_LCORE; cid++) {
        struct dpvs_msg_type mt = {.type = msg_type->type, .mode = DPVS_MSG_MULTICAST, .cid = (lcoreid_t)cid};
        int err;

        if (cid == master) {
            mt.prio = msg_type->prio;
            mt.multicast_msg_cb = msg_type->multicast_msg_cb ? msg_type->multicast_msg_cb : multicast_done;
        } else if (is_worker((lcoreid_t)cid)) {
            mt.prio = MSG_PRIO_IGN;
            mt.unicast_msg_cb = msg_type->unicast_msg_cb;
        } else {
            continue;
        }
        err = apply(&mt);
        if (err < 0)
            return err;
    }
    return EDPVS_OK;
}

int msg_type_mc_register(const struct dpvs_msg_type *msg_type)
{
    return each_lcore(msg_type, msg_type_register);
}

int msg_type_mc_unregister(const struct dpvs_msg_type *msg_type)
{
    return each_lcore(msg_type, msg_type_unregister);
}

/* Messages. */

void *msg_reply_alloc(int size)
{
    return dpvs_mempool_get(size);
}

void msg_reply_free(void *mptr)
{
    dpvs_mempool_put(mptr);
}

struct dpvs_msg *msg_make(msgid_t type, uint32_t seq, msg_mode_t mode, lcoreid_t cid, uint32_t len, const void *data)
{
    struct dpvs_msg *msg = dpvs_mempool_get((int)(sizeof(*msg) + len));

    if (!msg)
        return NULL;
    rte_spinlock_init(&msg->lock);
    msg->type = type;
    msg->seq = seq;
    msg->mode = mode;
    msg->cid = cid;
    msg->len = len;
    if (len && data)
        memcpy(msg->data, data, len);
    rte_atomic16_set(&msg->refcnt, 1);
    return msg;
}

static struct dpvs_multicast_queue *mcq_get(msgid_t type, uint32_t seq)
{
    struct dpvs_multicast_queue *mcq;

    assert(rte_lcore_id() == master);
    list_for_each_entry (mcq, &mc_waiting[(type ^ seq) % MC_BUCKETS], list) {
        if (mcq->type == type && mcq->seq == seq)
            return mcq;
    }
    return NULL;
}

static void mcq_free(struct dpvs_multicast_queue *mcq)
{
    struct dpvs_msg *answer, *next;

    list_for_each_entry_safe (answer, next, &mcq->mq, mq_node) {
        list_del_init(&answer->mq_node);
        flags_add(answer, DPVS_MSG_F_STATE_FIN);
        msg_destroy(&answer);
    }
    list_del_init(&mcq->list);
    dpvs_mempool_put(mcq);
}

int msg_destroy(struct dpvs_msg **pmsg)
{
    struct dpvs_msg *msg;

    if (!pmsg || !*pmsg)
        return EDPVS_INVAL;
    msg = *pmsg;
    assert(rte_atomic16_read(&msg->refcnt) != 0);
    *pmsg = NULL;
    if (!rte_atomic16_dec_and_test(&msg->refcnt))
        return EDPVS_OK;
    if (msg->mode == DPVS_MSG_MULTICAST) {
        struct dpvs_multicast_queue *mcq = mcq_get(msg->type, msg->seq);
        if (mcq)
            mcq_free(mcq);
        else
            LOG(WARNING, "%s: multicast msg type %u seq %u not in queue\n", __func__, msg->type, msg->seq);
    }
    if (msg->reply.data) {
        assert(msg->reply.len != 0);
        msg_reply_free(msg->reply.data);
    }
    dpvs_mempool_put(msg);
    return EDPVS_OK;
}

static void master_process(int step);

static int outcome(struct dpvs_msg *msg)
{
    uint32_t flags = flags_get(msg);

    if (flags & DPVS_MSG_F_CALLBACK_FAIL)
        return EDPVS_MSG_FAIL;
    return flags & DPVS_MSG_F_STATE_FIN ? EDPVS_OK : EDPVS_MSG_DROP;
}

/* Wait for the end of a message, doing our own meanwhile: its sender may be its target. False at the time-out. */
static bool wait_done(struct dpvs_msg *msg, int step)
{
    uint64_t limit = rte_get_timer_cycles() + (uint64_t)twin_conf.msg_timeout_us * g_cycles_per_sec / 1000000;

    flags_add(msg, DPVS_MSG_F_STATE_SEND);
    while (!(flags_get(msg) & (DPVS_MSG_F_STATE_FIN | DPVS_MSG_F_STATE_DROP))) {
        if (rte_get_timer_cycles() > limit) {
            LOG(WARNING, "msg type %u from lcore %u: timeout (%d us), drop...\n", msg->type, msg->cid,
                twin_conf.msg_timeout_us);
            flags_add(msg, DPVS_MSG_F_TIMEOUT);
            return false;
        }
        if (rte_lcore_id() == master)
            master_process(step);
        else
            msg_slave_process(step);
    }
    return true;
}

int msg_send(struct dpvs_msg *msg, lcoreid_t cid, uint32_t flags, struct dpvs_msg_reply **reply)
{
    struct dpvs_msg_type *mt;

    if (!msg)
        return EDPVS_INVAL;
    flags_add(msg, flags);
    if (cid != master && !is_worker(cid)) {
        flags_add(msg, DPVS_MSG_F_STATE_DROP);
        return EDPVS_INVAL;
    }
    mt = type_get(msg->type, cid);
    if (!mt) {
        LOG(WARNING, "%s: msg type %u not registered on lcore %u\n", __func__, msg->type, cid);
        flags_add(msg, DPVS_MSG_F_STATE_DROP);
        return EDPVS_NOTEXIST;
    }
    type_put(mt);

    rte_atomic16_inc(&msg->refcnt); /* the target's */
    if (rte_ring_enqueue(rings[cid], msg) != 0) {
        LOG(ERR, "%s: msg ring of lcore %u is full\n", __func__, cid);
        flags_add(msg, DPVS_MSG_F_STATE_DROP);
        rte_atomic16_dec(&msg->refcnt);
        return EDPVS_DPDKAPIFAIL;
    }
    if (flags & DPVS_MSG_F_ASYNC)
        return EDPVS_OK;
    if (!wait_done(msg, 1))
        return EDPVS_MSG_DROP;
    if (reply)
        *reply = &msg->reply;
    return outcome(msg);
}

int multicast_msg_send(struct dpvs_msg *msg, uint32_t flags, struct dpvs_multicast_queue **reply)
{
    struct dpvs_multicast_queue *mcq;

    if (!msg)
        return EDPVS_INVAL;
    flags_add(msg, flags);
    if (msg->mode != DPVS_MSG_MULTICAST || msg->cid != master || mcq_get(msg->type, msg->seq)) {
        bool again = msg->mode == DPVS_MSG_MULTICAST && msg->cid == master;
        flags_add(msg, DPVS_MSG_F_STATE_DROP);
        msg->mode = DPVS_MSG_UNICAST; /* its end must not take the other one's queue away */
        return again ? EDPVS_BUSY : EDPVS_INVAL;
    }

    rte_atomic16_inc(&msg->refcnt);
    for (unsigned cid = 0; cid < DPVS_MAX_LCORE; cid++) {
        struct dpvs_msg *copy;
        int err;

        if (!is_worker((lcoreid_t)cid))
            continue;
        copy = msg_make(msg->type, msg->seq, DPVS_MSG_UNICAST, msg->cid, msg->len, msg->data);
        err = copy ? msg_send(copy, (lcoreid_t)cid, DPVS_MSG_F_ASYNC, NULL) : EDPVS_NOMEM;
        msg_destroy(&copy);
        if (err < 0) {
            flags_add(msg, DPVS_MSG_F_STATE_DROP);
            rte_atomic16_dec(&msg->refcnt);
            return err;
        }
    }

    mcq = dpvs_mempool_get(sizeof(*mcq));
    if (!mcq) {
        flags_add(msg, DPVS_MSG_F_STATE_DROP);
        rte_atomic16_dec(&msg->refcnt);
        return EDPVS_NOMEM;
    }
    mcq->type = msg->type;
    mcq->seq = msg->seq;
    mcq->mask = g_slave_lcore_mask;
    mcq->org_msg = msg;
    INIT_LIST_HEAD(&mcq->mq);
    list_add_tail(&mcq->list, &mc_waiting[(msg->type ^ msg->seq) % MC_BUCKETS]);

    if (flags & DPVS_MSG_F_ASYNC)
        return EDPVS_OK;
    if (!wait_done(msg, RTE_MAX(g_slave_lcore_num, 1))) {
        struct dpvs_msg *late = msg;
        msg_destroy(&late); /* no worker will give this reference back */
        return EDPVS_MSG_DROP;
    }
    if (reply)
        *reply = mcq;
    return outcome(msg);
}

/* A worker's answer to a multicast message: kept in the queue of the original until all have answered. */
static void collect(struct dpvs_msg *msg, struct dpvs_msg_type *mt)
{
    struct dpvs_multicast_queue *mcq = mcq_get(msg->type, msg->seq);
    uint64_t bit = UINT64_C(1) << msg->cid;
    struct dpvs_msg *original;

    if (!mcq || !(mcq->mask & bit)) {
        LOG(INFO, "multicast reply type %u seq %u from lcore %u is late\n", msg->type, msg->seq, msg->cid);
        flags_add(msg, DPVS_MSG_F_STATE_DROP);
        msg_destroy(&msg);
        return;
    }
    original = mcq->org_msg;
    list_add_tail(&msg->mq_node, &mcq->mq);
    flags_add(msg, DPVS_MSG_F_STATE_QUEUE);
    mcq->mask &= ~bit;
    if (flags_get(msg) & DPVS_MSG_F_CALLBACK_FAIL)
        flags_add(original, DPVS_MSG_F_CALLBACK_FAIL);
    if (mcq->mask == 0) {
        if (mt->multicast_msg_cb(mcq) < 0)
            flags_add(original, DPVS_MSG_F_CALLBACK_FAIL);
        flags_add(original, DPVS_MSG_F_STATE_FIN);
        msg_destroy(&original);
    }
}

static void run_callback(struct dpvs_msg *msg, struct dpvs_msg_type *mt)
{
    if (mt->unicast_msg_cb && mt->unicast_msg_cb(msg) < 0)
        flags_add(msg, DPVS_MSG_F_CALLBACK_FAIL);
}

static void master_process(int step)
{
    struct dpvs_msg *msg;
    struct dpvs_msg_type *mt;

    for (int n = 0; (step <= 0 || n < step) && rte_ring_dequeue(rings[master], (void **)&msg) == 0; n++) {
        twin_worked();
        flags_add(msg, DPVS_MSG_F_STATE_RECV);
        mt = type_get(msg->type, master);
        if (!mt) {
            flags_add(msg, DPVS_MSG_F_STATE_DROP);
            msg_destroy(&msg);
        } else if (mt->mode == DPVS_MSG_UNICAST) {
            run_callback(msg, mt);
            flags_add(msg, DPVS_MSG_F_STATE_FIN);
            msg_destroy(&msg);
        } else {
            collect(msg, mt);
        }
        type_put(mt);
    }
}

static int answer_multicast(struct dpvs_msg *msg, lcoreid_t cid)
{
    struct dpvs_msg *answer = msg_make(msg->type, msg->seq, DPVS_MSG_UNICAST, cid, msg->reply.len, msg->reply.data);
    int err;

    if (!answer)
        return EDPVS_NOMEM;
    flags_add(answer, flags_get(msg) & DPVS_MSG_F_CALLBACK_FAIL);
    err = msg_send(answer, master, DPVS_MSG_F_ASYNC, NULL);
    msg_destroy(&answer);
    return err;
}

int msg_slave_process(int step)
{
    lcoreid_t cid = (lcoreid_t)rte_lcore_id();
    struct dpvs_msg *msg;
    int n = 0, ret = EDPVS_OK;

    if (cid == master)
        return EDPVS_NONEALCORE;
    while (rte_ring_dequeue(rings[cid], (void **)&msg) == 0) {
        struct dpvs_msg_type *mt = msg->mode == DPVS_MSG_MULTICAST ? NULL : type_get(msg->type, cid);
        uint32_t end = DPVS_MSG_F_STATE_FIN;

        twin_worked();
        flags_add(msg, DPVS_MSG_F_STATE_RECV);
        if (mt) {
            run_callback(msg, mt);
            if (mt->mode == DPVS_MSG_MULTICAST && (ret = answer_multicast(msg, cid)) != EDPVS_OK)
                end = DPVS_MSG_F_STATE_DROP;
            type_put(mt);
        } else {
            end = DPVS_MSG_F_STATE_DROP;
        }
        flags_add(msg, end);
        msg_destroy(&msg);
        if (step > 0 && ++n >= step)
            break;
    }
    return ret;
}

static int reg_cb(struct dpvs_msg *msg)
{
    return msg->len == sizeof(struct dpvs_msg_type) ? msg_type_register((void *)msg->data) : EDPVS_INVAL;
}

static int unreg_cb(struct dpvs_msg *msg)
{
    return msg->len == sizeof(struct dpvs_msg_type) ? msg_type_unregister((void *)msg->data) : EDPVS_INVAL;
}

static void master_job_func(void *dummy __rte_unused)
{
    master_process(0);
}

static void slave_job_func(void *dummy __rte_unused)
{
    msg_slave_process(0);
}

static struct dpvs_lcore_job master_job = {.name = "msg_master_job", .type = LCORE_JOB_LOOP, .func = master_job_func};
static struct dpvs_lcore_job slave_job = {.name = "msg_slave_job", .type = LCORE_JOB_LOOP, .func = slave_job_func};

int msg_init(void)
{
    int err = dpvs_mempool_init();

    if (err != EDPVS_OK)
        return err;
    master = (lcoreid_t)rte_get_main_lcore();
    for (int bucket = 0; bucket < MC_BUCKETS; bucket++)
        INIT_LIST_HEAD(&mc_waiting[bucket]);
    for (int cid = 0; cid < DPVS_MAX_LCORE; cid++) {
        char name[16];

        for (int bucket = 0; bucket < TYPE_BUCKETS; bucket++) {
            INIT_LIST_HEAD(&types[cid][bucket]);
            rte_rwlock_init(&type_locks[cid][bucket]);
        }
        snprintf(name, sizeof(name), "msg_ring_%d", cid);
        rings[cid] = rte_ring_create(name, (unsigned)twin_conf.msg_ring_size, (int)rte_socket_id(), RING_F_SC_DEQ);
        if (!rings[cid])
            return EDPVS_DPDKAPIFAIL;
    }
    for (unsigned cid = 0; cid < DPVS_MAX_LCORE; cid++) {
        struct dpvs_msg_type mt = {.mode = DPVS_MSG_UNICAST, .prio = MSG_PRIO_HIGH, .cid = (lcoreid_t)cid};

        if (cid != master && !is_worker((lcoreid_t)cid))
            continue;
        mt.type = MSG_TYPE_REG, mt.unicast_msg_cb = reg_cb;
        msg_type_register(&mt);
        mt.type = MSG_TYPE_UNREG, mt.unicast_msg_cb = unreg_cb;
        msg_type_register(&mt);
    }
    dpvs_lcore_job_register(&master_job, LCORE_ROLE_MASTER);
    dpvs_lcore_job_register(&slave_job, LCORE_ROLE_FWD_WORKER);
    return EDPVS_OK;
}
