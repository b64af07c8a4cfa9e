/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Sessions (DPVS src/ipvs/ip_vs_conn.c): a mempool dp_vs_conn_<socket>, one table a worker with two entries a session,
 * one locked table of templates. A session's life passes the calls that probes sit on, in DPVS's order: redirect_alloc,
 * laddr_bind, redirect_init, (hash) redirect_hash; at the end redirect_unhash, laddr_unbind, redirect_free. Its timer
 * handler is dp_vs_conn_expire, which re-arms while somebody holds or is controlled by the session, and frees it
 * otherwise.
 */
#include <stdlib.h>

#include <rte_jhash.h>

#include "twin.h"

static RTE_DEFINE_PER_LCORE(struct list_head *, dp_vs_conn_tbl);
static RTE_DEFINE_PER_LCORE(uint32_t, dp_vs_conn_count);
static struct list_head *dp_vs_ct_tbl;
static rte_spinlock_t dp_vs_ct_lock;
static uint32_t dp_vs_conn_rnd;
static struct rte_mempool *dp_vs_conn_cache[DPVS_MAX_SOCKET];

#define this_conn_tbl RTE_PER_LCORE(dp_vs_conn_tbl)
#define this_conn_count RTE_PER_LCORE(dp_vs_conn_count)

static int dp_vs_conn_expire(void *priv);

static unsigned this_socket(void)
{
    unsigned socket = rte_socket_id();
    return socket < DPVS_MAX_SOCKET && dp_vs_conn_cache[socket] ? socket : 0;
}

static bool is_template(const struct dp_vs_conn *conn)
{
    return conn->flags & DPVS_CONN_F_TEMPLATE;
}

static struct dp_vs_conn *conn_alloc(enum dpvs_fwd_mode fwdmode, uint32_t flags)
{
    struct rte_mempool *pool = dp_vs_conn_cache[this_socket()];
    struct dp_vs_conn *conn;

    if (rte_mempool_get(pool, (void **)&conn) != 0) {
        LOG(ERR, "%s: no memory for connection\n", __func__);
        return NULL;
    }
    memset(conn, 0, sizeof(*conn));
    conn->connpool = pool;
    this_conn_count++;
    if (!(flags & DPVS_CONN_F_TEMPLATE))
        conn->redirect = dp_vs_redirect_alloc(fwdmode);
    return conn;
}

static void conn_free(struct dp_vs_conn *conn)
{
    dp_vs_redirect_free(conn);
    rte_mempool_put(conn->connpool, conn);
    this_conn_count--;
}

/* Timers: a template's is global, a session's is its worker's; a one-packet session has none. */

static void timer_attach(struct dp_vs_conn *conn)
{
    if (conn->flags & (DPVS_CONN_F_IN_TIMER | DPVS_CONN_F_ONE_PACKET))
        return;
    if (dpvs_timer_sched(&conn->timer, &conn->timeout, dp_vs_conn_expire, conn, is_template(conn)) == EDPVS_OK)
        conn->flags |= DPVS_CONN_F_IN_TIMER;
}

static void timer_detach(struct dp_vs_conn *conn, bool locked)
{
    bool global = is_template(conn);
    int err;

    if (!(conn->flags & DPVS_CONN_F_IN_TIMER))
        return;
    err = locked ? dpvs_timer_cancel(&conn->timer, global) : dpvs_timer_cancel_nolock(&conn->timer, global);
    if (err == EDPVS_OK)
        conn->flags &= (uint16_t)~DPVS_CONN_F_IN_TIMER;
}

static void timer_refresh(struct dp_vs_conn *conn, bool locked)
{
    bool global = is_template(conn);

    if (!(conn->flags & DPVS_CONN_F_IN_TIMER) || (conn->flags & DPVS_CONN_F_ONE_PACKET))
        return;
    if (locked)
        dpvs_timer_update(&conn->timer, &conn->timeout, global);
    else
        dpvs_timer_update_nolock(&conn->timer, &conn->timeout, global);
}

/* Tables. */

uint32_t dp_vs_conn_hashkey(int af, const union inet_addr *saddr, uint16_t sport, const union inet_addr *daddr,
                            uint16_t dport, uint32_t mask)
{
    uint32_t ports = (uint32_t)sport << 16 | dport;
    uint32_t words[9];

    if (af == AF_INET)
        return rte_jhash_3words(saddr->in.s_addr, daddr->in.s_addr, ports, dp_vs_conn_rnd) & mask;
    if (af != AF_INET6)
        return 0;
    words[0] = ports;
    memcpy(&words[1], &saddr->in6, 16);
    memcpy(&words[5], &daddr->in6, 16);
    return rte_jhash_32b(words, RTE_DIM(words), dp_vs_conn_rnd) & mask;
}

static uint32_t tuple_hash(const struct conn_tuple_hash *t)
{
    return dp_vs_conn_hashkey(t->af, &t->saddr, t->sport, &t->daddr, t->dport, DPVS_CONN_TBL_MASK);
}

static int conn_hash(struct dp_vs_conn *conn)
{
    struct list_head *table = is_template(conn) ? dp_vs_ct_tbl : this_conn_tbl;
    int err = EDPVS_EXIST;

    if (conn->flags & DPVS_CONN_F_ONE_PACKET)
        return EDPVS_OK;
    if (!(conn->flags & DPVS_CONN_F_HASHED)) {
        if (is_template(conn))
            rte_spinlock_lock(&dp_vs_ct_lock);
        list_add(&tuplehash_in(conn).list, &table[tuple_hash(&tuplehash_in(conn))]);
        list_add(&tuplehash_out(conn).list, &table[tuple_hash(&tuplehash_out(conn))]);
        if (is_template(conn))
            rte_spinlock_unlock(&dp_vs_ct_lock);
        conn->flags |= DPVS_CONN_F_HASHED;
        rte_atomic32_inc(&conn->refcnt);
        err = EDPVS_OK;
    }
    dp_vs_redirect_hash(conn);
    return err;
}

/* Only with no holder but the table and the caller. */
static int conn_unhash(struct dp_vs_conn *conn)
{
    if (!(conn->flags & DPVS_CONN_F_HASHED))
        return conn->flags & DPVS_CONN_F_ONE_PACKET ? EDPVS_OK : EDPVS_NOTEXIST;
    if (rte_atomic32_read(&conn->refcnt) != 2)
        return EDPVS_BUSY;
    dp_vs_redirect_unhash(conn);
    if (is_template(conn))
        rte_spinlock_lock(&dp_vs_ct_lock);
    list_del(&tuplehash_in(conn).list);
    list_del(&tuplehash_out(conn).list);
    if (is_template(conn))
        rte_spinlock_unlock(&dp_vs_ct_lock);
    conn->flags &= (uint16_t)~DPVS_CONN_F_HASHED;
    rte_atomic32_dec(&conn->refcnt);
    return EDPVS_OK;
}

static struct dp_vs_conn *table_find(const struct list_head *table, int af, uint16_t proto,
                                     const union inet_addr *saddr, const union inet_addr *daddr, uint16_t sport,
                                     uint16_t dport, int *dir)
{
    uint32_t hash = dp_vs_conn_hashkey(af, saddr, sport, daddr, dport, DPVS_CONN_TBL_MASK);
    struct conn_tuple_hash *t;

    list_for_each_entry (t, &table[hash], list) {
        if (t->sport == sport && t->dport == dport && t->proto == proto && t->af == af &&
            inet_addr_equal(af, &t->saddr, saddr) && inet_addr_equal(af, &t->daddr, daddr)) {
            struct dp_vs_conn *conn = tuplehash_to_conn(t);
            rte_atomic32_inc(&conn->refcnt);
            if (dir)
                *dir = t->direct;
            return conn;
        }
    }
    return NULL;
}

struct dp_vs_conn *dp_vs_conn_get(int af, uint16_t proto, const union inet_addr *saddr, const union inet_addr *daddr,
                                  uint16_t sport, uint16_t dport, int *dir, bool reverse)
{
    if (reverse)
        return table_find(this_conn_tbl, af, proto, daddr, saddr, dport, sport, dir);
    return table_find(this_conn_tbl, af, proto, saddr, daddr, sport, dport, dir);
}

struct dp_vs_conn *dp_vs_ct_in_get(int af, uint16_t proto, const union inet_addr *saddr, const union inet_addr *daddr,
                                   uint16_t sport, uint16_t dport)
{
    struct dp_vs_conn *conn;

    rte_spinlock_lock(&dp_vs_ct_lock);
    conn = table_find(dp_vs_ct_tbl, af, proto, saddr, daddr, sport, dport, NULL);
    rte_spinlock_unlock(&dp_vs_ct_lock);
    return conn;
}

/* The real server: its counters follow the INACTIVE flag, which every session starts with (from dest->conn_flags). */

static int bind_xmit(struct dp_vs_conn *conn, enum dpvs_fwd_mode fwdmode)
{
    switch (fwdmode) {
    case DPVS_FWD_MODE_NAT:
        conn->packet_xmit = dp_vs_xmit_nat;
        conn->packet_out_xmit = dp_vs_out_xmit_nat;
        return EDPVS_OK;
    case DPVS_FWD_MODE_TUNNEL:
        conn->packet_xmit = dp_vs_xmit_tunnel;
        return EDPVS_OK;
    case DPVS_FWD_MODE_DR:
        conn->packet_xmit = dp_vs_xmit_dr;
        return EDPVS_OK;
    case DPVS_FWD_MODE_FNAT:
        conn->packet_xmit = dp_vs_xmit_fnat;
        conn->packet_out_xmit = dp_vs_out_xmit_fnat;
        return EDPVS_OK;
    case DPVS_FWD_MODE_SNAT:
        conn->packet_xmit = dp_vs_xmit_snat;
        conn->packet_out_xmit = dp_vs_out_xmit_snat;
        return EDPVS_OK;
    default:
        return EDPVS_NOTSUPP;
    }
}

static uint32_t dest_conns(struct dp_vs_dest *dest)
{
    return (uint32_t)(rte_atomic32_read(&dest->inactconns) + rte_atomic32_read(&dest->actconns));
}

static int bind_dest(struct dp_vs_conn *conn, struct dp_vs_dest *dest)
{
    conn->flags |= (uint16_t)rte_atomic16_read(&dest->conn_flags);
    if (dest->max_conn && dest_conns(dest) >= dest->max_conn) {
        dest->flags |= DPVS_DEST_F_OVERLOAD;
        return EDPVS_OVERLOAD;
    }
    rte_atomic32_inc(&dest->refcnt);
    rte_atomic32_inc(is_template(conn) ? &dest->persistconns : &dest->inactconns);
    if (bind_xmit(conn, dest->fwdmode) != EDPVS_OK)
        return EDPVS_NOTSUPP;
    conn->dest = dest;
    return EDPVS_OK;
}

static void unbind_dest(struct dp_vs_conn *conn, bool timerlock)
{
    struct dp_vs_dest *dest = conn->dest;

    if (is_template(conn))
        rte_atomic32_dec(&dest->persistconns);
    else
        rte_atomic32_dec(conn->flags & DPVS_CONN_F_INACTIVE ? &dest->inactconns : &dest->actconns);
    if (dest->max_conn && dest_conns(dest) < dest->max_conn)
        dest->flags &= (uint16_t)~DPVS_DEST_F_OVERLOAD;
    dp_vs_dest_put(dest, timerlock);
    conn->dest = NULL;
}

/* Time-outs. */

unsigned dp_vs_conn_get_timeout(struct dp_vs_conn *conn)
{
    return conn && conn->dest && conn->dest->svc ? conn->dest->svc->conn_timeout : 0;
}

void dp_vs_conn_set_timeout(struct dp_vs_conn *conn, struct dp_vs_proto *pp)
{
    bool own = conn->proto == IPPROTO_UDP || (conn->proto == IPPROTO_TCP && conn->state == DPVS_TCP_S_ESTABLISHED) ||
               (conn->proto == IPPROTO_SCTP && conn->state == DPVS_SCTP_S_ESTABLISHED);
    unsigned seconds = own ? dp_vs_conn_get_timeout(conn) : 0;

    if (seconds == 0)
        seconds = pp && pp->timeout_table ? (unsigned)pp->timeout_table[conn->state] : 60;
    conn->timeout.tv_sec = seconds;
}

void conn_enter(struct dp_vs_proto *proto, struct dp_vs_conn *conn, uint16_t state, uint16_t active)
{
    struct dp_vs_dest *dest = conn->dest;
    bool inactive = conn->flags & DPVS_CONN_F_INACTIVE;

    conn->old_state = conn->state;
    conn->state = state;
    dp_vs_conn_set_timeout(conn, proto);
    if (!dest || inactive == (state != active))
        return;
    rte_atomic32_add(&dest->actconns, inactive ? 1 : -1);
    rte_atomic32_add(&dest->inactconns, inactive ? -1 : 1);
    conn->flags ^= DPVS_CONN_F_INACTIVE;
}

void dp_vs_conn_expire_now(struct dp_vs_conn *conn)
{
    if (!(conn->flags & DPVS_CONN_F_IN_TIMER) || is_template(conn))
        return;
    conn->timeout.tv_sec = 0; /* taken up by the dp_vs_conn_put() that follows */
    conn->timeout.tv_usec = 0;
}

/* Birth. */

static uint16_t server_port(const struct dp_vs_conn *conn, struct rte_mbuf *mbuf, const struct dp_vs_iphdr *iph,
                            const struct dp_vs_conn_param *param, const struct dp_vs_dest *dest, bool *ok)
{
    const uint16_t *ports;

    *ok = true;
    if (is_template(conn) || param->ct_dport != 0)
        return param->ct_dport;
    if (dest->fwdmode != DPVS_FWD_MODE_SNAT)
        return dest->port;
    if (param->proto == IPPROTO_ICMP || param->proto == IPPROTO_ICMPV6)
        return param->vport;
    ports = mbuf_header(mbuf, iph->len, 4);
    *ok = ports != NULL;
    return ports ? ports[0] : 0;
}

static void fill_tuple(struct conn_tuple_hash *t, int direct, int af, uint8_t proto, const union inet_addr *saddr,
                       uint16_t sport, const union inet_addr *daddr, uint16_t dport)
{
    t->direct = direct;
    t->af = af;
    t->proto = proto;
    t->saddr = *saddr;
    t->sport = sport;
    t->daddr = *daddr;
    t->dport = dport;
    INIT_LIST_HEAD(&t->list);
}

struct dp_vs_conn *dp_vs_conn_new(struct rte_mbuf *mbuf, const struct dp_vs_iphdr *iph, struct dp_vs_conn_param *param,
                                  struct dp_vs_dest *dest, uint32_t flags)
{
    const union inet_addr *server;
    struct dp_vs_conn *conn;
    uint16_t rport;
    bool ok;

    assert(mbuf && param && dest);
    conn = conn_alloc(dest->fwdmode, flags);
    if (!conn)
        return NULL;
    conn->flags = (uint16_t)flags;
    rport = server_port(conn, mbuf, iph, param, dest, &ok);
    if (!ok)
        goto free_conn;

    /* outbound as for all modes but FNAT, whose local address dp_vs_laddr_bind() puts in */
    server = dest->fwdmode == DPVS_FWD_MODE_SNAT ? &iph->saddr : &dest->addr;
    fill_tuple(&tuplehash_in(conn), DPVS_CONN_DIR_INBOUND, param->af, param->proto, param->caddr, param->cport,
               param->vaddr, param->vport);
    fill_tuple(&tuplehash_out(conn), DPVS_CONN_DIR_OUTBOUND, dest->af, param->proto, server, rport, param->caddr,
               param->cport);
    conn->af = param->af;
    conn->proto = param->proto;
    conn->caddr = *param->caddr;
    conn->cport = param->cport;
    conn->vaddr = *param->vaddr;
    conn->vport = param->vport;
    conn->laddr = *param->caddr;
    conn->lport = param->cport;
    conn->daddr = *server;
    conn->dport = rport;
    if (dest->fwdmode == DPVS_FWD_MODE_FNAT)
        conn->pp_version = dest->svc->proxy_protocol;
    rte_atomic32_set(&conn->refcnt, 1); /* the caller's */

    if (bind_dest(conn, dest) != EDPVS_OK) {
        LOG(WARNING, "%s: fail to bind dest\n", __func__);
        goto free_conn;
    }
    if (dest->fwdmode == DPVS_FWD_MODE_FNAT && dp_vs_laddr_bind(conn, dest->svc) != EDPVS_OK)
        goto unbind;

    dp_vs_redirect_init(conn);
    if (conn_hash(conn) != EDPVS_OK) {
        dp_vs_laddr_unbind(conn);
        goto unbind;
    }

    conn->timeout.tv_sec = twin_conf.conn_init_timeout;
    conn->timeout.tv_usec = 0;
    INIT_LIST_HEAD(&conn->ack_mbuf);
    rte_atomic32_set(&conn->syn_retry_max, 0);
    rte_atomic32_set(&conn->dup_ack_cnt, 0);
    dpvs_time_rand_delay(&conn->timeout, 1000000);
    timer_attach(conn);
    return conn;

unbind:
    unbind_dest(conn, true);
free_conn:
    conn_free(conn);
    return NULL;
}

/* Use and death. */

void dp_vs_conn_put_no_reset(struct dp_vs_conn *conn)
{
    rte_atomic32_dec(&conn->refcnt);
}

void dp_vs_conn_put(struct dp_vs_conn *conn)
{
    if (conn->flags & DPVS_CONN_F_ONE_PACKET) {
        dp_vs_conn_expire(conn);
        return;
    }
    timer_refresh(conn, true);
    assert(rte_atomic32_read(&conn->refcnt) > 0);
    rte_atomic32_dec(&conn->refcnt);
}

static void control_del(struct dp_vs_conn *conn)
{
    struct dp_vs_conn *ctl = conn->control;

    conn->control = NULL;
    if (ctl && rte_atomic32_read(&ctl->n_control) > 0)
        rte_atomic32_dec(&ctl->n_control);
}

static int dp_vs_conn_expire(void *priv)
{
    struct dp_vs_conn *conn = priv;
    struct dp_vs_proto *pp;

    assert(conn);
    assert(conn->af == AF_INET || conn->af == AF_INET6);
    assert(rte_atomic32_read(&conn->refcnt) > 0);

    pp = dp_vs_proto_lookup(conn->proto);
    dp_vs_conn_set_timeout(conn, pp);
    dpvs_time_rand_delay(&conn->timeout, 1000000);
    if (!(conn->flags & DPVS_CONN_F_ONE_PACKET))
        rte_atomic32_inc(&conn->refcnt);

    if (rte_atomic32_read(&conn->n_control)) { /* a template with sessions */
        timer_refresh(conn, false);
        assert(rte_atomic32_read(&conn->refcnt) > 0);
        rte_atomic32_dec(&conn->refcnt);
        return DTIMER_OK;
    }

    conn_unhash(conn);
    if (rte_atomic32_sub_return(&conn->refcnt, 1) != 0) { /* in use: later */
        conn_hash(conn);
        timer_refresh(conn, false);
        return DTIMER_OK;
    }
    timer_detach(conn, false);
    if (conn->control)
        control_del(conn);
    if (pp && pp->conn_expire)
        pp->conn_expire(pp, conn);
    unbind_dest(conn, false);
    dp_vs_laddr_unbind(conn);
    conn_free(conn);
    return DTIMER_STOP;
}

/* Free every session of this worker that nobody holds. */
int conn_flush_this(void)
{
    int left = 0;

    for (int i = 0; i < DPVS_CONN_TBL_SIZE; i++) {
        struct list_head *head = &this_conn_tbl[i];

        while (!list_empty(head)) {
            struct dp_vs_conn *conn = tuplehash_to_conn(list_entry(head->next, struct conn_tuple_hash, list));

            timer_detach(conn, true);
            rte_atomic32_inc(&conn->refcnt);
            if (conn_unhash(conn) != EDPVS_OK) {
                rte_atomic32_dec(&conn->refcnt);
                left++;
                break;
            }
            unbind_dest(conn, true);
            dp_vs_laddr_unbind(conn);
            rte_atomic32_dec(&conn->refcnt);
            conn_free(conn);
        }
    }
    return left;
}

struct list_head *conn_this_table(void)
{
    return this_conn_tbl;
}

uint32_t conn_this_count(void)
{
    return this_conn_count;
}

int dp_vs_conn_pool_size(void)
{
    return twin_conf.conn_pool_size;
}

int dp_vs_conn_pool_cache_size(void)
{
    return twin_conf.conn_pool_cache;
}

int conn_dump_templates(int (*dump)(const struct list_head *table))
{
    int err;

    rte_spinlock_lock(&dp_vs_ct_lock);
    err = dump(dp_vs_ct_tbl);
    rte_spinlock_unlock(&dp_vs_ct_lock);
    return err;
}

static struct list_head *table_create(void)
{
    struct list_head *table = rte_malloc(NULL, sizeof(*table) * DPVS_CONN_TBL_SIZE, RTE_CACHE_LINE_SIZE);

    for (int i = 0; table && i < DPVS_CONN_TBL_SIZE; i++)
        INIT_LIST_HEAD(&table[i]);
    return table;
}

static int init_worker(void *arg __rte_unused)
{
    if (!netif_lcore_is_fwd_worker((lcoreid_t)rte_lcore_id()))
        return EDPVS_OK;
    this_conn_tbl = table_create();
    this_conn_count = 0;
    return this_conn_tbl ? EDPVS_OK : EDPVS_NOMEM;
}

int dp_vs_conn_init(void)
{
    unsigned lcore;

    dp_vs_ct_tbl = table_create();
    if (!dp_vs_ct_tbl)
        return EDPVS_NOMEM;
    rte_spinlock_init(&dp_vs_ct_lock);
    rte_eal_mp_remote_launch(init_worker, NULL, SKIP_MAIN);
    RTE_LCORE_FOREACH_WORKER (lcore) {
        int err = rte_eal_wait_lcore(lcore);
        if (err < 0)
            return err;
    }
    if (conn_ctrl_init() != EDPVS_OK)
        return EDPVS_INVAL;
    for (int i = 0; i < RTE_MIN(get_numa_nodes(), DPVS_MAX_SOCKET); i++) {
        char name[32];

        snprintf(name, sizeof(name), "dp_vs_conn_%d", i);
        dp_vs_conn_cache[i] = rte_mempool_create(name, (unsigned)twin_conf.conn_pool_size, sizeof(struct dp_vs_conn),
                                                 (unsigned)twin_conf.conn_pool_cache, 0, NULL, NULL, NULL, NULL, i, 0);
        if (!dp_vs_conn_cache[i])
            return EDPVS_NOMEM;
    }
    dp_vs_conn_rnd = (uint32_t)random();
    return EDPVS_OK;
}
