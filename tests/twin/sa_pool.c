/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Local ports (DPVS src/sa_pool.c): each worker has, for each local address, the ports with (port & mask) == its base,
 * in pools hashed by the real server's address and port. The head of the free list is taken, the tail is where a
 * released port goes. A release asserts that the entry of that port carries that very address and port; asserts are on.
 */
#include <rte_jhash.h>

#include "twin.h"

#define LOWEST_PORT 1025
#define HIGHEST_PORT 65535

struct sa_flow {
    uint16_t mask;
    uint16_t port_base; /* network order */
    uint16_t shift;
};

static struct sa_flow sa_flows[DPVS_MAX_LCORE];

int sa_pool_init(void)
{
    uint16_t base = 0, shift = 0;

    while ((1u << shift) < g_slave_lcore_num)
        shift++;
    for (unsigned cid = 0; cid < DPVS_MAX_LCORE; cid++) {
        if (!(g_slave_lcore_mask & (UINT64_C(1) << cid)))
            continue;
        sa_flows[cid].mask = (uint16_t)((1u << shift) - 1);
        sa_flows[cid].port_base = htons(base++);
        sa_flows[cid].shift = shift;
    }
    return EDPVS_OK;
}

static bool on_worker(void)
{
    unsigned cid = rte_lcore_id();
    return cid < DPVS_MAX_LCORE && (g_slave_lcore_mask & (UINT64_C(1) << cid));
}

/* One allocation, as in DPVS: the heads of all hashed pools, then their entries. */
static int alloc_pools(struct sa_pool *ap, uint8_t hash_sz, const struct sa_flow *flow)
{
    size_t entries = MAX_PORT >> flow->shift;
    struct sa_entry *first;

    ap->pool_hash = rte_zmalloc(NULL, hash_sz * (sizeof(struct sa_entry_pool) + entries * sizeof(struct sa_entry)), 64);
    if (!ap->pool_hash)
        return EDPVS_NOMEM;
    ap->pool_hash_sz = hash_sz;
    first = (struct sa_entry *)&ap->pool_hash[hash_sz];
    for (unsigned hash = 0; hash < hash_sz; hash++) {
        struct sa_entry_pool *pool = &ap->pool_hash[hash];

        INIT_LIST_HEAD(&pool->used_enties);
        INIT_LIST_HEAD(&pool->free_enties);
        pool->shift = flow->shift;
        pool->sa_entries = first + entries * hash;
        for (uint32_t port = ap->low; port <= ap->high; port++) {
            struct sa_entry *entry = &pool->sa_entries[port >> pool->shift];

            if (flow->mask && (port & flow->mask) != ntohs(flow->port_base))
                continue;
            entry->addr = ap->ifa->addr;
            entry->port = htons((uint16_t)port);
            list_add_tail(&entry->list, &pool->free_enties);
            pool->free_cnt++;
        }
    }
    return EDPVS_OK;
}

int sa_pool_create(struct inet_ifaddr *ifa, uint16_t low, uint16_t high)
{
    struct sa_pool *ap;

    if (!on_worker())
        return on_master() ? EDPVS_OK : EDPVS_INVAL;
    low = low ? low : LOWEST_PORT;
    high = high ? high : HIGHEST_PORT;
    if (!ifa || low > high)
        return EDPVS_INVAL;
    ap = rte_zmalloc(NULL, sizeof(*ap), 0);
    if (!ap)
        return EDPVS_NOMEM;
    ap->ifa = ifa;
    ap->low = low;
    ap->high = high;
    rte_atomic32_set(&ap->refcnt, 1);
    if (alloc_pools(ap, (uint8_t)twin_conf.sa_hash_size, &sa_flows[rte_lcore_id()]) != EDPVS_OK) {
        rte_free(ap);
        return EDPVS_NOMEM;
    }
    ifa->sa_pool = ap;
    rte_atomic32_inc(&ifa->refcnt);
    return EDPVS_OK;
}

/* Give one reference back: the address's own or that of a port in use. */
int sa_pool_destroy(struct inet_ifaddr *ifa)
{
    struct sa_pool *ap;

    if (!on_worker())
        return on_master() ? EDPVS_OK : EDPVS_INVAL;
    if (!ifa || !ifa->sa_pool)
        return EDPVS_INVAL;
    ap = ifa->sa_pool;
    if (!rte_atomic32_dec_and_test(&ap->refcnt))
        return EDPVS_OK;
    rte_free(ap->pool_hash);
    rte_free(ap);
    ifa->sa_pool = NULL;
    inet_addr_ifa_put(ifa);
    return EDPVS_OK;
}

static struct sa_entry_pool *pool_of(const struct sa_pool *ap, const struct sockaddr_storage *server)
{
    uint32_t key;

    assert(ap && ap->pool_hash && ap->pool_hash_sz >= 1);
    if (!server)
        return &ap->pool_hash[0];
    if (server->ss_family == AF_INET) {
        const struct sockaddr_in *sin = (const struct sockaddr_in *)server;
        key = (ntohl(sin->sin_addr.s_addr) & 0xffff) + ntohs(sin->sin_port);
    } else {
        const struct sockaddr_in6 *sin6 = (const struct sockaddr_in6 *)server;
        uint32_t words[5] = {sin6->sin6_port};
        memcpy(&words[1], &sin6->sin6_addr, 16);
        key = rte_jhash_32b(words, RTE_DIM(words), AF_INET6);
    }
    return &ap->pool_hash[key % ap->pool_hash_sz];
}

static int take(struct sa_entry_pool *pool, struct sockaddr_storage *local)
{
    struct sa_entry *entry;

    if (list_empty(&pool->free_enties)) {
        pool->miss_cnt++;
        return EDPVS_RESOURCE;
    }
    entry = list_entry(pool->free_enties.next, struct sa_entry, list);
    if (local->ss_family == AF_INET) {
        ((struct sockaddr_in *)local)->sin_addr = entry->addr.in;
        ((struct sockaddr_in *)local)->sin_port = entry->port;
    } else {
        ((struct sockaddr_in6 *)local)->sin6_addr = entry->addr.in6;
        ((struct sockaddr_in6 *)local)->sin6_port = entry->port;
    }
    entry->flags |= SA_F_USED;
    list_move_tail(&entry->list, &pool->used_enties);
    pool->used_cnt++;
    pool->free_cnt--;
    return EDPVS_OK;
}

static int give_back(struct sa_entry_pool *pool, const struct sockaddr_storage *local)
{
    const struct sockaddr_in *sin = (const struct sockaddr_in *)local;
    const struct sockaddr_in6 *sin6 = (const struct sockaddr_in6 *)local;
    uint16_t port = ntohs(local->ss_family == AF_INET ? sin->sin_port : sin6->sin6_port);
    struct sa_entry *entry;

    assert(port > 0);
    entry = &pool->sa_entries[port >> pool->shift];
    if (!(entry->flags & SA_F_USED)) {
        LOG(WARNING, "%s: port %d not in use !\n", __func__, port);
        return EDPVS_INVAL;
    }
    if (local->ss_family == AF_INET)
        assert(entry->addr.in.s_addr == sin->sin_addr.s_addr && entry->port == sin->sin_port);
    else
        assert(!memcmp(&entry->addr.in6, &sin6->sin6_addr, 16) && entry->port == sin6->sin6_port);
    entry->flags &= ~(uint32_t)SA_F_USED;
    list_move_tail(&entry->list, &pool->free_enties);
    pool->used_cnt--;
    pool->free_cnt++;
    return EDPVS_OK;
}

static union inet_addr addr_of(const struct sockaddr_storage *ss)
{
    union inet_addr addr;

    memset(&addr, 0, sizeof(addr));
    if (ss->ss_family == AF_INET)
        addr.in = ((const struct sockaddr_in *)ss)->sin_addr;
    else
        addr.in6 = ((const struct sockaddr_in6 *)ss)->sin6_addr;
    return addr;
}

/* The local address has to be given: the twin does not choose one by route. */
int sa_fetch(int af, struct netif_port *dev, const struct sockaddr_storage *daddr, struct sockaddr_storage *saddr)
{
    union inet_addr local;
    struct inet_ifaddr *ifa;
    int err;

    if (!saddr || saddr->ss_family != af || (daddr && daddr->ss_family != af))
        return EDPVS_INVAL;
    if (af != AF_INET && af != AF_INET6)
        return EDPVS_NOTSUPP;
    local = addr_of(saddr);
    ifa = inet_addr_ifa_get(af, dev, &local);
    if (!ifa)
        return EDPVS_NOTEXIST;
    if (!ifa->sa_pool) {
        LOG(WARNING, "%s: fetch addr on IP without sapool.\n", __func__);
        inet_addr_ifa_put(ifa);
        return EDPVS_INVAL;
    }
    err = take(pool_of(ifa->sa_pool, daddr), saddr);
    if (err == EDPVS_OK)
        rte_atomic32_inc(&ifa->sa_pool->refcnt);
    inet_addr_ifa_put(ifa);
    return err;
}

int sa_release(const struct netif_port *dev, const struct sockaddr_storage *daddr, const struct sockaddr_storage *saddr)
{
    union inet_addr local;
    struct inet_ifaddr *ifa;
    int err;

    if (!saddr || (daddr && daddr->ss_family != saddr->ss_family))
        return EDPVS_INVAL;
    if (saddr->ss_family != AF_INET && saddr->ss_family != AF_INET6)
        return EDPVS_NOTSUPP;
    local = addr_of(saddr);
    ifa = inet_addr_ifa_get(saddr->ss_family, dev, &local);
    if (!ifa)
        ifa = inet_addr_ifa_get_expired(saddr->ss_family, dev, &local);
    if (!ifa)
        return EDPVS_NOTEXIST;
    err = ifa->sa_pool ? give_back(pool_of(ifa->sa_pool, daddr), saddr) : EDPVS_INVAL;
    if (err == EDPVS_OK)
        sa_pool_destroy(ifa);
    inet_addr_ifa_put(ifa);
    return err;
}

int get_sa_pool_stats(const struct inet_ifaddr *ifa, struct sa_pool_stats *stats)
{
    if (!ifa || !ifa->sa_pool || !stats)
        return EDPVS_INVAL;
    memset(stats, 0, sizeof(*stats));
    for (unsigned hash = 0; hash < ifa->sa_pool->pool_hash_sz; hash++) {
        const struct sa_entry_pool *pool = &ifa->sa_pool->pool_hash[hash];
        stats->used_cnt += pool->used_cnt;
        stats->free_cnt += pool->free_cnt;
        stats->miss_cnt += pool->miss_cnt;
    }
    return EDPVS_OK;
}
