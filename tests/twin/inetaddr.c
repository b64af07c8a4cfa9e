/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Addresses of the port (DPVS src/inetaddr.c): each lcore has its own copies. One that is deleted while sessions still
 * use its ports waits in the list of the expired, where their release finds it.
 */
#include <arpa/inet.h>
#include <linux/if_addr.h>

#include "twin.h"

#define BUCKETS 256

static struct list_head table[DPVS_MAX_LCORE][BUCKETS];
static struct list_head expired[DPVS_MAX_LCORE];
static struct inet_device device;

static struct list_head *bucket_of(int af, const union inet_addr *addr)
{
    const uint32_t *w = addr->in6.s6_addr32;
    uint32_t fold = af == AF_INET ? addr->in.s_addr : w[0] ^ w[1] ^ w[2] ^ w[3];

    return &table[rte_lcore_id()][(ntohl(fold) ^ (uint32_t)af) % BUCKETS];
}

static struct inet_ifaddr *hold_in(struct list_head *list, int af, const union inet_addr *addr, uint8_t plen)
{
    struct inet_ifaddr *ifa;

    list_for_each_entry (ifa, list, h_list) {
        if (ifa->af == af && (!plen || ifa->plen == plen) && inet_addr_equal(af, &ifa->addr, addr)) {
            rte_atomic32_inc(&ifa->refcnt);
            return ifa;
        }
    }
    return NULL;
}

struct netif_port *inet_addr_get_iface(int af, union inet_addr *addr)
{
    struct inet_ifaddr *ifa = hold_in(bucket_of(af, addr), af, addr, 0);

    if (!ifa)
        return NULL;
    inet_addr_ifa_put(ifa);
    return device.dev;
}

/* With one port there is one device; another one given is an address that is not there. */
struct inet_ifaddr *inet_addr_ifa_get(int af, const struct netif_port *dev, union inet_addr *addr)
{
    return dev && dev != device.dev ? NULL : hold_in(bucket_of(af, addr), af, addr, 0);
}

struct inet_ifaddr *inet_addr_ifa_get_expired(int af, const struct netif_port *dev, union inet_addr *addr)
{
    return dev && dev != device.dev ? NULL : hold_in(&expired[rte_lcore_id()], af, addr, 0);
}

void inet_addr_ifa_put(struct inet_ifaddr *ifa)
{
    if (!rte_atomic32_dec_and_test(&ifa->refcnt))
        return;
    list_del_init(&ifa->h_list);
    rte_free(ifa);
}

static void link_ifa(struct inet_ifaddr *ifa)
{
    unsigned cid = rte_lcore_id();

    list_add(&ifa->h_list, bucket_of(ifa->af, &ifa->addr));
    list_add(&ifa->d_list, &device.ifa_list[cid]);
    device.ifa_cnt[cid]++;
    rte_atomic32_inc(&ifa->refcnt);
}

/* On each lcore. The flag IFA_F_SAPOOL makes it a local address, with ports. */
int ifa_add(int af, const union inet_addr *addr, uint8_t plen, uint32_t flags)
{
    struct inet_ifaddr *ifa = hold_in(bucket_of(af, addr), af, addr, plen);

    if (ifa) {
        inet_addr_ifa_put(ifa);
        return EDPVS_EXIST;
    }
    ifa = hold_in(&expired[rte_lcore_id()], af, addr, plen);
    if (ifa) { /* back from the expired, ports and all */
        if (ifa->sa_pool)
            rte_atomic32_inc(&ifa->sa_pool->refcnt);
        list_del_init(&ifa->h_list);
        link_ifa(ifa);
        inet_addr_ifa_put(ifa);
        return EDPVS_OK;
    }
    ifa = rte_zmalloc(NULL, sizeof(*ifa), RTE_CACHE_LINE_SIZE);
    if (!ifa)
        return EDPVS_NOMEM;
    ifa->idev = &device;
    ifa->af = af;
    ifa->addr = *addr;
    ifa->plen = plen;
    ifa->flags = flags | IFA_F_PERMANENT;
    if (af == AF_INET)
        ifa->mask.in.s_addr = plen ? htonl(~0u << (32 - plen)) : 0;
    INIT_LIST_HEAD(&ifa->h_list);
    if ((flags & IFA_F_SAPOOL) && sa_pool_create(ifa, 0, 0) != EDPVS_OK) {
        rte_free(ifa);
        return EDPVS_NOMEM;
    }
    link_ifa(ifa);
    return EDPVS_OK;
}

int ifa_del(int af, const union inet_addr *addr, uint8_t plen)
{
    struct inet_ifaddr *ifa = hold_in(bucket_of(af, addr), af, addr, plen);
    unsigned cid = rte_lcore_id();

    if (!ifa)
        return EDPVS_NOTEXIST;
    list_del_init(&ifa->h_list);
    list_del_init(&ifa->d_list);
    device.ifa_cnt[cid]--;
    list_add_tail(&ifa->h_list, &expired[cid]);
    if (ifa->sa_pool)
        sa_pool_destroy(ifa);
    rte_atomic32_dec(&ifa->refcnt); /* the table's */
    inet_addr_ifa_put(ifa);
    return EDPVS_OK;
}

bool ifa_is_local(int af, const union inet_addr *addr)
{
    union inet_addr key = *addr;

    return inet_addr_get_iface(af, &key) != NULL;
}

static bool same_subnet(int af, const union inet_addr *a, const union inet_addr *b, unsigned plen)
{
    const uint8_t *x = (const uint8_t *)a, *y = (const uint8_t *)b;
    unsigned bytes = plen / 8, bits = plen % 8;

    assert(plen <= (af == AF_INET ? 32 : 128));
    return !memcmp(x, y, bytes) && (bits == 0 || !((x[bytes] ^ y[bytes]) >> (8 - bits)));
}

/* The address to ask from: the one whose subnet holds `daddr`. */
bool ifa_source(int af, const union inet_addr *daddr, union inet_addr *source)
{
    const struct inet_ifaddr *ifa;

    list_for_each_entry (ifa, &device.ifa_list[rte_lcore_id()], d_list) {
        if (ifa->af == af && ifa->plen < (af == AF_INET ? 32 : 128) &&
            same_subnet(af, &ifa->addr, daddr, ifa->plen)) {
            *source = ifa->addr;
            return true;
        }
    }
    return false;
}

/* The local addresses of this lcore and the state of their ports. */
void ifa_json(FILE *out)
{
    const struct inet_ifaddr *ifa;
    const char *comma = "";

    fprintf(out, "[");
    list_for_each_entry (ifa, &device.ifa_list[rte_lcore_id()], d_list) {
        struct sa_pool_stats st;
        char text[INET6_ADDRSTRLEN];

        if (get_sa_pool_stats(ifa, &st) != EDPVS_OK)
            continue;
        inet_ntop(ifa->af, &ifa->addr, text, sizeof(text));
        fprintf(out, "%s{\"addr\":\"%s\",\"used\":%u,\"free\":%u,\"miss\":%u}", comma, text, st.used_cnt, st.free_cnt,
                st.miss_cnt);
        comma = ",";
    }
    fprintf(out, "]");
}

int inetaddr_init(void)
{
    device.dev = twin_port;
    twin_port->in_ptr = &device;
    for (int cid = 0; cid < DPVS_MAX_LCORE; cid++) {
        INIT_LIST_HEAD(&expired[cid]);
        INIT_LIST_HEAD(&device.ifa_list[cid]);
        INIT_LIST_HEAD(&device.ifm_list[cid]);
        for (int i = 0; i < BUCKETS; i++)
            INIT_LIST_HEAD(&table[cid][i]);
    }
    return EDPVS_OK;
}
