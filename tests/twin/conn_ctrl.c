/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the control socket tells about sessions (DPVS src/ipvs/ip_vs_conn.c): GET_CONN_SPECIFIED asks all workers by a
 * multicast message, GET_CONN_ALL has each worker copy its whole table into one global list while the master spins, and
 * hands that out, 1024 a reply. SET_CONN is reserved and empty.
 */
#include "sockopts.h"
#include "twin.h"

struct dump_block {
    int head;
    int tail;
    struct list_head ca_list;
    ipvs_conn_entry_t array[0];
};

static struct list_head to_dump = LIST_HEAD_INIT(to_dump);

static const char *state_name(uint16_t proto, uint16_t state)
{
    static const char *const tcp[] = {"TCP_NONE",  "TCP_EST",    "SYN_SENT", "SYN_RECV", "FIN_WAIT", "TIME_WAIT",
                                      "TCP_CLOSE", "CLOSE_WAIT", "LAST_ACK", "LISTEN",   "SYNACK"};
#ifdef TWIN_BEFORE_1_9_6
    static const char *const udp[] = {"UDP_NORM", "UDP_LAST"};
#else
    static const char *const udp[] = {"UDP_NONE", "UDP_ONEWAY", "UDP_NORM", "UDP_LAST"};
#endif
    static const char *const sctp[] = {"SCTP_NONE", "SCTP_INIT1", "SCTP_INIT", "SCTP_COOKIE_SENT",
                                       "SCTP_COOKIE_REPLIED", "SCTP_COOKIE_WAIT", "SCTP_COOKIE", "SCTP_COOKIE_ECHOED",
                                       "SCTP_ESTABLISHED", "SCTP_SHUTDOWN_SENT", "SCTP_SHUTDOWN_RECEIVED",
                                       "SCTP_SHUTDOWN_ACK_SENT", "SCTP_REJECTED", "SCTP_CLOSED"};

    if (proto == IPPROTO_TCP)
        return state < RTE_DIM(tcp) ? tcp[state] : "TCP_UNKOWN";
    if (proto == IPPROTO_UDP)
        return state < RTE_DIM(udp) ? udp[state] : "UDP_UNKOWN";
    if (proto == IPPROTO_SCTP)
        return state < RTE_DIM(sctp) ? sctp[state] : "SCTP_UNKNOWN";
    return "UNKOWN";
}

static void fill_entry(const struct dp_vs_conn *conn, ipvs_conn_entry_t *entry)
{
    memset(entry, 0, sizeof(*entry));
    entry->in_af = (uint16_t)tuplehash_in(conn).af;
    entry->out_af = (uint16_t)tuplehash_out(conn).af;
    entry->proto = conn->proto;
    entry->lcoreid = (uint8_t)rte_lcore_id();
    snprintf(entry->state, sizeof(entry->state), "%s", state_name(conn->proto, conn->state));
    entry->caddr = conn->caddr;
    entry->vaddr = conn->vaddr;
    entry->laddr = conn->laddr;
    entry->daddr = conn->daddr;
    entry->cport = conn->cport;
    entry->vport = conn->vport;
    entry->lport = conn->lport;
    entry->dport = conn->dport;
    entry->timeout = (uint32_t)conn->timeout.tv_sec;
}

/* On the lcore of the table. */
static int dump_table(const struct list_head *table)
{
    struct dump_block *block = NULL;

    for (int i = 0; i < DPVS_CONN_TBL_SIZE; i++) {
        struct conn_tuple_hash *t;

        list_for_each_entry (t, &table[i], list) {
            if (t->direct != DPVS_CONN_DIR_INBOUND)
                continue;
            if (!block) {
                block =
                    rte_zmalloc("conn_ctrl", sizeof(*block) + MAX_CTRL_CONN_GET_ENTRIES * sizeof(ipvs_conn_entry_t), 0);
                if (!block)
                    return EDPVS_NOMEM;
            }
            fill_entry(tuplehash_to_conn(t), &block->array[block->tail++]);
            if (block->tail == MAX_CTRL_CONN_GET_ENTRIES) {
                list_add_tail(&block->ca_list, &to_dump);
                block = NULL;
            }
        }
    }
    if (block)
        list_add_tail(&block->ca_list, &to_dump);
    return EDPVS_OK;
}

static void drop_dump(void)
{
    struct dump_block *block, *next;

    list_for_each_entry_safe (block, next, &to_dump, ca_list) {
        list_del_init(&block->ca_list);
        rte_free(block);
    }
}

/* Move entries from the list into the reply; true when that is full. */
static bool fill_reply(struct ip_vs_conn_array *reply, uint32_t *got)
{
    struct dump_block *block, *next;

    list_for_each_entry_safe (block, next, &to_dump, ca_list) {
        int n = RTE_MIN(block->tail - block->head, (int)(MAX_CTRL_CONN_GET_ENTRIES - *got));

        memcpy((char *)reply + sizeof(*reply) + *got * sizeof(ipvs_conn_entry_t), &block->array[block->head],
               (size_t)n * sizeof(ipvs_conn_entry_t));
        block->head += n;
        *got += (uint32_t)n;
        if (block->head == block->tail) {
            list_del_init(&block->ca_list);
            rte_free(block);
        }
        if (*got == MAX_CTRL_CONN_GET_ENTRIES)
            return true;
    }
    return false;
}

static int finish(struct ip_vs_conn_array *reply, uint32_t got, uint32_t result, unsigned cid, int err)
{
    reply->nconns = got;
    reply->resl = result;
    reply->curcid = (uint8_t)cid;
    return err;
}

static int dump_worker(lcoreid_t cid)
{
    const uint32_t done = DPVS_MSG_F_STATE_FIN | DPVS_MSG_F_STATE_DROP;
    struct dpvs_msg *msg = msg_make(MSG_TYPE_CONN_GET_ALL, 0, DPVS_MSG_UNICAST, (lcoreid_t)rte_lcore_id(), 0, NULL);
    uint32_t flags;
    int err;

    if (!msg)
        return EDPVS_NOMEM;
    err = msg_send(msg, cid, DPVS_MSG_F_ASYNC, NULL); /* no time-out: a big table takes its time */
    do {
        rte_spinlock_lock(&msg->lock);
        flags = msg->flags;
        rte_spinlock_unlock(&msg->lock);
    } while (!(flags & done));
    msg_destroy(&msg);
    if (err == EDPVS_OK && (flags & (DPVS_MSG_F_STATE_DROP | DPVS_MSG_F_CALLBACK_FAIL)))
        err = EDPVS_MSG_FAIL;
    return err;
}

static int get_all(const struct ip_vs_conn_req *req, struct ip_vs_conn_array *reply)
{
    unsigned cid = req->whence;
    uint32_t got = 0;
    int err;

    for (;;) {
        if (fill_reply(reply, &got))
            return finish(reply, got, GET_IPVS_CONN_RESL_OK | GET_IPVS_CONN_RESL_MORE, cid, EDPVS_OK);
        if (req->flag & GET_IPVS_CONN_FLAG_TEMPLATE) {
            if (cid != rte_get_main_lcore())
                return finish(reply, got, GET_IPVS_CONN_RESL_OK, 0, EDPVS_OK);
            err = conn_dump_templates(dump_table);
        } else {
            while (cid < DPVS_MAX_LCORE && !(g_slave_lcore_mask & (UINT64_C(1) << cid)))
                cid++;
            if (cid >= DPVS_MAX_LCORE)
                return finish(reply, got, GET_IPVS_CONN_RESL_OK, 0, EDPVS_OK);
            err = dump_worker((lcoreid_t)cid);
        }
        if (err != EDPVS_OK)
            return finish(reply, got, GET_IPVS_CONN_RESL_FAIL, cid, err);
        cid++;
    }
}

static int get_specified(const struct ip_vs_conn_req *req, struct ip_vs_conn_array *reply)
{
    const ipvs_sockpair_t *pair = &req->sockpair;
    struct dpvs_multicast_queue *mcq;
    struct dpvs_msg *msg, *answer;
    int err;

    if (req->flag & GET_IPVS_CONN_FLAG_TEMPLATE) {
        struct dp_vs_conn *conn =
            dp_vs_ct_in_get(pair->af, pair->proto, &pair->sip, &pair->tip, pair->sport, pair->tport);
        if (conn) {
            ipvs_conn_entry_t entry;
            fill_entry(conn, &entry);
            memcpy((char *)reply + sizeof(*reply), &entry, sizeof(entry));
            dp_vs_conn_put(conn);
            return finish(reply, 1, GET_IPVS_CONN_RESL_OK, 0, EDPVS_OK);
        }
    }

    msg = msg_make(MSG_TYPE_CONN_GET, 0, DPVS_MSG_MULTICAST, (lcoreid_t)rte_lcore_id(), sizeof(*req), req);
    if (!msg)
        return EDPVS_NOMEM;
    err = multicast_msg_send(msg, 0, &mcq);
    if (err == EDPVS_OK) {
        list_for_each_entry (answer, &mcq->mq, mq_node) {
            const struct ip_vs_conn_array *found = (const void *)answer->data;
            if (found->resl == GET_IPVS_CONN_RESL_OK && found->nconns == 1) {
                memcpy(reply, found, sizeof(*reply) + sizeof(ipvs_conn_entry_t));
                msg_destroy(&msg);
                return EDPVS_OK;
            }
        }
    }
    msg_destroy(&msg);
    return finish(reply, 0, GET_IPVS_CONN_RESL_FAIL, 0, EDPVS_NOTEXIST);
}

static int sockopt_conn_get(sockoptid_t opt, const void *in, size_t inlen, void **out, size_t *outlen)
{
    const struct ip_vs_conn_req *req = in;
    struct ip_vs_conn_array *reply;
    bool all = opt == SOCKOPT_GET_CONN_ALL;
    size_t entries = all ? MAX_CTRL_CONN_GET_ENTRIES : 1;
    int err;

    *out = NULL;
    *outlen = 0;
    if (!in || inlen != sizeof(*req))
        return EDPVS_INVAL;
    if (!all && (opt != SOCKOPT_GET_CONN_SPECIFIED || !(req->flag & GET_IPVS_CONN_FLAG_SPECIFIED)))
        return EDPVS_INVAL;
    if (all && !(req->flag & (GET_IPVS_CONN_FLAG_ALL | GET_IPVS_CONN_FLAG_MORE)))
        return EDPVS_INVAL;
    if (all && !(req->flag & GET_IPVS_CONN_FLAG_MORE))
        drop_dump(); /* a new dump throws away what another client has not fetched yet */

    reply = rte_zmalloc("conn_ctrl", sizeof(*reply) + entries * sizeof(ipvs_conn_entry_t), 0);
    if (!reply)
        return EDPVS_NOMEM;
    err = all ? get_all(req, reply) : get_specified(req, reply);
    if (err < 0) {
        rte_free(reply);
        return err;
    }
    *out = reply;
    *outlen = sizeof(*reply) + reply->nconns * sizeof(ipvs_conn_entry_t);
    return err;
}

static struct dpvs_sockopts conn_sockopts = {
    .version = SOCKOPT_VERSION,
    .set_opt_min = SOCKOPT_SET_CONN,
    .set_opt_max = SOCKOPT_SET_CONN,
    .set = NULL,
    .get_opt_min = SOCKOPT_GET_CONN_ALL,
    .get_opt_max = SOCKOPT_GET_CONN_SPECIFIED,
    .get = sockopt_conn_get,
};

static int on_get(struct dpvs_msg *msg)
{
    const struct ip_vs_conn_req *req = (const void *)msg->data;
    const ipvs_sockpair_t *pair = &req->sockpair;
    struct ip_vs_conn_array *found;
    struct dp_vs_conn *conn;
    int dir, len = sizeof(*found);

    assert(msg->len == sizeof(*req));
    if (req->flag & GET_IPVS_CONN_FLAG_TEMPLATE)
        return EDPVS_INVAL;
    conn = dp_vs_conn_get(pair->af, pair->proto, &pair->sip, &pair->tip, pair->sport, pair->tport, &dir, false);
    if (!conn)
        conn = dp_vs_conn_get(pair->af, pair->proto, &pair->sip, &pair->tip, pair->sport, pair->tport, &dir, true);
    if (conn)
        len += (int)sizeof(ipvs_conn_entry_t);
    found = msg_reply_alloc(len);
    if (!found) {
        if (conn)
            dp_vs_conn_put(conn);
        return EDPVS_NOMEM;
    }
    memset(found, 0, (size_t)len);
    if (conn) {
        ipvs_conn_entry_t entry;
        found->nconns = 1;
        found->resl = GET_IPVS_CONN_RESL_OK;
        fill_entry(conn, &entry);
        memcpy((char *)found + sizeof(*found), &entry, sizeof(entry));
        dp_vs_conn_put(conn); /* asking refreshes the session's timer, in DPVS too */
    }
    msg->reply.len = (uint32_t)len;
    msg->reply.data = found;
    return EDPVS_OK;
}

static int on_get_all(struct dpvs_msg *msg __rte_unused)
{
    return dump_table(conn_this_table());
}

int conn_ctrl_init(void)
{
    struct dpvs_msg_type get = {
        .type = MSG_TYPE_CONN_GET, .mode = DPVS_MSG_MULTICAST, .prio = MSG_PRIO_LOW, .unicast_msg_cb = on_get};
    int err = msg_type_mc_register(&get);

    for (unsigned cid = 0; err == EDPVS_OK && cid < DPVS_MAX_LCORE; cid++) {
        struct dpvs_msg_type all = {.type = MSG_TYPE_CONN_GET_ALL,
                                    .mode = DPVS_MSG_UNICAST,
                                    .prio = MSG_PRIO_LOW,
                                    .cid = (lcoreid_t)cid,
                                    .unicast_msg_cb = on_get_all};
        if (g_slave_lcore_mask & (UINT64_C(1) << cid))
            err = msg_type_register(&all);
    }
    return err == EDPVS_OK ? sockopt_register(&conn_sockopts) : err;
}
