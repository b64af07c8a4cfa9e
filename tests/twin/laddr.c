/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Local addresses of a service (DPVS src/ipvs/ip_vs_laddr.c): round robin, each worker its own; the port comes from
 * sa_pool. */
#include <arpa/inet.h>

#include <rte_random.h>

#include "twin.h"

#define MAX_TRAILS 16

/* With rr and wrr 5 % of the sessions skip one address, or servers and addresses would go round in step. */
static int step_of(const struct dp_vs_service *svc)
{
    const char *name = svc->scheduler->name;

    if (!strncmp(name, "rr", 2) || !strncmp(name, "wrr", 3))
        return rte_rand_max(100) < 5 ? 2 : 1;
    return 1;
}

static struct dp_vs_laddr *next_laddr(struct dp_vs_service *svc)
{
    struct dp_vs_laddr *laddr;

    assert(svc->laddr_list.next);
    if (list_empty(&svc->laddr_list))
        return NULL;
    for (int step = step_of(svc); step > 0; step--) {
        svc->laddr_curr = svc->laddr_curr ? svc->laddr_curr->next : svc->laddr_list.next;
        if (svc->laddr_curr == &svc->laddr_list)
            svc->laddr_curr = svc->laddr_list.next;
    }
    laddr = list_entry(svc->laddr_curr, struct dp_vs_laddr, list);
    rte_atomic32_inc(&laddr->refcnt);
    return laddr;
}

static void put_laddr(struct dp_vs_laddr *laddr)
{
    if (laddr && rte_atomic32_dec_and_test(&laddr->refcnt))
        rte_free(laddr);
}

static void to_sockaddr(struct sockaddr_storage *ss, int af, const union inet_addr *addr, uint16_t port)
{
    memset(ss, 0, sizeof(*ss));
    ss->ss_family = (sa_family_t)af;
    if (af == AF_INET) {
        struct sockaddr_in *sin = (struct sockaddr_in *)ss;
        sin->sin_addr = addr->in;
        sin->sin_port = port;
    } else {
        struct sockaddr_in6 *sin6 = (struct sockaddr_in6 *)ss;
        sin6->sin6_addr = addr->in6;
        sin6->sin6_port = port;
    }
}

static uint16_t port_of(const struct sockaddr_storage *ss)
{
    if (ss->ss_family == AF_INET)
        return ((const struct sockaddr_in *)ss)->sin_port;
    return ((const struct sockaddr_in6 *)ss)->sin6_port;
}

int dp_vs_laddr_bind(struct dp_vs_conn *conn, struct dp_vs_service *svc)
{
    if (!conn || !conn->dest || !svc)
        return EDPVS_INVAL;
    if (svc->proto != IPPROTO_TCP && svc->proto != IPPROTO_UDP && svc->proto != IPPROTO_SCTP)
        return EDPVS_NOTSUPP;
    if (conn->flags & DPVS_CONN_F_TEMPLATE)
        return EDPVS_OK;

    for (uint32_t i = 0; i < MAX_TRAILS && i < svc->num_laddrs; i++) {
        struct dp_vs_laddr *laddr = next_laddr(svc);
        struct sockaddr_storage server, local;

        if (!laddr) {
            LOG(ERR, "%s: no laddr available.\n", __func__);
            return EDPVS_RESOURCE;
        }
        to_sockaddr(&server, laddr->af, &conn->daddr, conn->dport);
        to_sockaddr(&local, laddr->af, &laddr->addr, 0);
        if (sa_fetch(laddr->af, laddr->iface, &server, &local) != EDPVS_OK) {
            put_laddr(laddr);
            continue;
        }
        rte_atomic32_inc(&laddr->conn_counts);
        conn->laddr = laddr->addr;
        conn->lport = port_of(&local);
        tuplehash_out(conn).daddr = laddr->addr;
        tuplehash_out(conn).dport = conn->lport;
        conn->local = laddr;
        return EDPVS_OK;
    }
    return EDPVS_RESOURCE;
}

int dp_vs_laddr_unbind(struct dp_vs_conn *conn)
{
    struct sockaddr_storage server, local;

    if (conn->flags & DPVS_CONN_F_TEMPLATE)
        return EDPVS_OK;
    if (!conn->local)
        return EDPVS_OK;
    to_sockaddr(&server, conn->local->af, &conn->daddr, conn->dport);
    to_sockaddr(&local, conn->local->af, &conn->laddr, conn->lport);
    sa_release(conn->local->iface, &server, &local);
    rte_atomic32_dec(&conn->local->conn_counts);
    put_laddr(conn->local);
    conn->local = NULL;
    return EDPVS_OK;
}

int dp_vs_laddr_add(struct dp_vs_service *svc, int af, const union inet_addr *addr, const char *ifname)
{
    struct dp_vs_laddr *laddr;

    if (!svc || !addr)
        return EDPVS_INVAL;
    list_for_each_entry (laddr, &svc->laddr_list, list) {
        if (af == laddr->af && inet_addr_equal(af, &laddr->addr, addr))
            return EDPVS_EXIST;
    }
    laddr = rte_zmalloc(NULL, sizeof(*laddr), RTE_CACHE_LINE_SIZE);
    if (!laddr)
        return EDPVS_NOMEM;
    laddr->af = af;
    laddr->addr = *addr;
    rte_atomic32_set(&laddr->refcnt, 1);
    laddr->iface = netif_port_get_by_name(ifname);
    if (!laddr->iface) {
        rte_free(laddr);
        return EDPVS_NOTEXIST;
    }
    list_add_tail(&laddr->list, &svc->laddr_list);
    svc->num_laddrs++;
    return EDPVS_OK;
}

static void unlink_laddr(struct dp_vs_service *svc, struct dp_vs_laddr *laddr)
{
    if (svc->laddr_curr == &laddr->list)
        svc->laddr_curr = laddr->list.next;
    list_del(&laddr->list);
    svc->num_laddrs--;
    put_laddr(laddr);
}

int dp_vs_laddr_del(struct dp_vs_service *svc, int af, const union inet_addr *addr)
{
    struct dp_vs_laddr *laddr, *next;

    if (!svc || !addr)
        return EDPVS_INVAL;
    list_for_each_entry_safe (laddr, next, &svc->laddr_list, list) {
        if (af == laddr->af && inet_addr_equal(af, &laddr->addr, addr)) {
            unlink_laddr(svc, laddr);
            return EDPVS_OK;
        }
    }
    return EDPVS_NOTEXIST;
}

void dp_vs_laddr_flush(struct dp_vs_service *svc)
{
    while (!list_empty(&svc->laddr_list))
        unlink_laddr(svc, list_entry(svc->laddr_list.next, struct dp_vs_laddr, list));
}
