/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Services and real servers (DPVS src/ipvs/ip_vs_{service,dest}.c): every lcore has its own copy of each. A session
 * holds its server, a server its service, so both outlive their deletion until the last session ends.
 */
#include <arpa/inet.h>

#include "sockopts.h"
#include "twin.h"

#define BUCKETS 256

#define RELEASE "1.10-2"
#define RELEASE_NUMBER 0x010a02u

/* include/conf/service.h */
struct dp_vs_getinfo {
    unsigned int version;
    unsigned int size;
    unsigned int num_services;
    unsigned int num_lcores;
};

/* include/conf/service.h, match.h */
struct dp_vs_services_front {
    lcoreid_t cid;
    lcoreid_t index;
    uint16_t count;
} __attribute__((aligned(8))); /* as its table of services is */

struct dp_vs_service_compat {
    int af;
    uint8_t proto;
    uint8_t proxy_protocol;
    uint16_t port;
    uint32_t fwmark;
    unsigned flags;
    unsigned timeout;
    unsigned conn_timeout;
    uint32_t netmask;
    unsigned bps;
    unsigned limit_proportion;
    union inet_addr addr;
    char sched_name[16];
    uint8_t match[108];
    unsigned num_dests;
    unsigned num_laddrs;
    lcoreid_t cid;
    lcoreid_t index;
    struct dp_vs_stats stats;
    struct dest_check_configs check_conf;
};

_Static_assert(sizeof(struct dp_vs_service_compat) == 264, "size of dp_vs_service_compat");
_Static_assert(offsetof(struct dp_vs_service_compat, addr) == 36, "dp_vs_service_compat.addr");
_Static_assert(offsetof(struct dp_vs_service_compat, stats) == 192, "dp_vs_service_compat.stats");

static struct list_head table[DPVS_MAX_LCORE][BUCKETS];
static unsigned num_services[DPVS_MAX_LCORE];

static struct list_head *bucket_of(int af, uint16_t proto, const union inet_addr *addr, lcoreid_t cid)
{
    const uint32_t *w = addr->in6.s6_addr32;
    uint32_t fold = af == AF_INET ? addr->in.s_addr : w[0] ^ w[1] ^ w[2] ^ w[3];

    return &table[cid][(proto ^ ntohl(fold)) % BUCKETS];
}

/* By address and port; firewall marks and match rules are not the twin's. */
struct dp_vs_service *dp_vs_service_lookup(int af, uint16_t protocol, const union inet_addr *vaddr, uint16_t vport,
                                           uint32_t fwmark __rte_unused, const struct rte_mbuf *mbuf __rte_unused,
                                           const struct dp_vs_match *match __rte_unused, lcoreid_t cid)
{
    struct dp_vs_service *svc;

    list_for_each_entry (svc, bucket_of(af, protocol, vaddr, cid), s_list) {
        if (svc->af == af && svc->port == vport && svc->proto == protocol && inet_addr_equal(af, &svc->addr, vaddr))
            return svc;
    }
    return NULL;
}

void dp_vs_service_put(struct dp_vs_service *svc)
{
    if (svc && rte_atomic32_dec_and_test(&svc->refcnt))
        rte_free(svc);
}

int service_add(int af, int proto, const union inet_addr *vip, uint16_t port, const char *sched)
{
    lcoreid_t cid = (lcoreid_t)rte_lcore_id();
    struct dp_vs_service *svc;

    if (dp_vs_service_lookup(af, (uint16_t)proto, vip, port, 0, NULL, NULL, cid))
        return EDPVS_EXIST;
    svc = rte_zmalloc("dp_vs_service", sizeof(*svc), RTE_CACHE_LINE_SIZE);
    if (!svc)
        return EDPVS_NOMEM;
    svc->af = af;
    svc->proto = (uint8_t)proto;
    svc->port = port;
    svc->addr = *vip;
    svc->netmask = af == AF_INET ? 0xffffffff : 128; /* of an IPv6 client, the length of a prefix */
    rte_atomic32_set(&svc->refcnt, 1);
    INIT_LIST_HEAD(&svc->dests);
    INIT_LIST_HEAD(&svc->laddr_list);
    svc->laddr_curr = &svc->laddr_list;
    svc->scheduler = dp_vs_scheduler_get(sched);
    if (!svc->scheduler || (svc->scheduler->init_service && svc->scheduler->init_service(svc) != EDPVS_OK)) {
        rte_free(svc);
        return EDPVS_NOTEXIST;
    }
    list_add(&svc->s_list, bucket_of(af, (uint16_t)proto, vip, cid));
    svc->flags |= DP_VS_SVC_F_HASHED;
    num_services[cid]++;
    return EDPVS_OK;
}

static void dest_unlink(struct dp_vs_service *svc, struct dp_vs_dest *dest, bool update)
{
    dest->flags &= (uint16_t)~DPVS_DEST_F_AVAILABLE;
    list_del(&dest->n_list);
    svc->num_dests--;
    svc->weight -= rte_atomic16_read(&dest->weight);
    if (update && svc->scheduler->update_service)
        svc->scheduler->update_service(svc, dest, DPVS_SO_SET_DELDEST);
    dp_vs_dest_put(dest, true);
}

int service_del(int af, int proto, const union inet_addr *vip, uint16_t port)
{
    struct dp_vs_service *svc =
        dp_vs_service_lookup(af, (uint16_t)proto, vip, port, 0, NULL, NULL, (lcoreid_t)rte_lcore_id());
    struct dp_vs_dest *dest, *next;

    if (!svc)
        return EDPVS_NOTEXIST;
    list_del(&svc->s_list);
    num_services[rte_lcore_id()]--;
    svc->flags &= ~(unsigned)DP_VS_SVC_F_HASHED;
    dp_vs_laddr_flush(svc);
    list_for_each_entry_safe (dest, next, &svc->dests, n_list)
        dest_unlink(svc, dest, false);
    if (svc->scheduler->exit_service)
        svc->scheduler->exit_service(svc);
    dp_vs_service_put(svc);
    return EDPVS_OK;
}

struct dp_vs_dest *dp_vs_dest_lookup(int af, struct dp_vs_service *svc, const union inet_addr *daddr, uint16_t dport)
{
    struct dp_vs_dest *dest;

    list_for_each_entry (dest, &svc->dests, n_list) {
        if (dest->af == af && dest->port == dport && inet_addr_equal(af, &dest->addr, daddr))
            return dest;
    }
    return NULL;
}

void dp_vs_dest_put(struct dp_vs_dest *dest, bool timerlock __rte_unused)
{
    if (!dest || !rte_atomic32_dec_and_test(&dest->refcnt))
        return;
    dp_vs_service_put(dest->svc);
    rte_free(dest);
}

int dest_add(struct dp_vs_service *svc, const struct dest_spec *spec, bool edit)
{
    struct dp_vs_dest *dest = dp_vs_dest_lookup(spec->af, svc, &spec->addr, spec->port);

    if (!dest == edit)
        return edit ? EDPVS_NOTEXIST : EDPVS_EXIST;
    if (!edit) {
        dest = rte_zmalloc("dpvs_new_dest", sizeof(*dest), RTE_CACHE_LINE_SIZE);
        if (!dest)
            return EDPVS_NOMEM;
        dest->af = spec->af;
        dest->addr = spec->addr;
        dest->port = spec->port;
        dest->proto = svc->proto;
        dest->vaddr = svc->addr;
        dest->vport = svc->port;
        rte_atomic32_set(&dest->refcnt, 1);
        rte_atomic32_inc(&svc->refcnt);
        dest->svc = svc;
        list_add(&dest->n_list, &svc->dests);
        svc->num_dests++;
    }
    svc->weight += spec->weight - rte_atomic16_read(&dest->weight);
    rte_atomic16_set(&dest->weight, (int16_t)spec->weight);
    rte_atomic16_set(&dest->conn_flags, DPVS_CONN_F_INACTIVE);
    dest->fwdmode = spec->mode;
    dest->flags |= DPVS_DEST_F_AVAILABLE;
    if (spec->max_conn == 0 || spec->max_conn > dest->max_conn)
        dest->flags &= (uint16_t)~DPVS_DEST_F_OVERLOAD;
    dest->max_conn = on_master() ? spec->max_conn % g_slave_lcore_num : spec->max_conn / g_slave_lcore_num;
    if (svc->scheduler->update_service)
        svc->scheduler->update_service(svc, dest, edit ? DPVS_SO_SET_EDITDEST : DPVS_SO_SET_ADDDEST);
    return EDPVS_OK;
}

int dest_del(struct dp_vs_service *svc, const struct dest_spec *spec)
{
    struct dp_vs_dest *dest = dp_vs_dest_lookup(spec->af, svc, &spec->addr, spec->port);

    if (!dest)
        return EDPVS_NOTEXIST;
    dest_unlink(svc, dest, true);
    return EDPVS_OK;
}

/* Some service of this lcore with a server of that mode, for sessions out of nothing. */
struct dp_vs_service *service_first(int proto, enum dpvs_fwd_mode mode)
{
    unsigned cid = rte_lcore_id();

    for (int i = 0; i < BUCKETS; i++) {
        struct dp_vs_service *svc;
        list_for_each_entry (svc, &table[cid][i], s_list) {
            if (svc->proto == proto && !list_empty(&svc->dests) &&
                list_entry(svc->dests.next, struct dp_vs_dest, n_list)->fwdmode == mode)
                return svc;
        }
    }
    return NULL;
}

static const char *mode_name(enum dpvs_fwd_mode mode)
{
    switch (mode) {
    case DPVS_FWD_MODE_FNAT:
        return "fnat";
    case DPVS_FWD_MODE_DR:
        return "dr";
    case DPVS_FWD_MODE_NAT:
        return "nat";
    case DPVS_FWD_MODE_TUNNEL:
        return "tunnel";
    default:
        return "snat";
    }
}

static void one_service_json(FILE *out, const struct dp_vs_service *svc)
{
    struct dp_vs_dest *dest;
    struct dp_vs_laddr *laddr;
    char text[INET6_ADDRSTRLEN];
    const char *comma = "";

    inet_ntop(svc->af, &svc->addr, text, sizeof(text));
    fprintf(out, "{\"proto\":\"%s\",\"vip\":\"%s\",\"port\":%u,\"sched\":\"%s\",\"dests\":[",
            svc->proto == IPPROTO_TCP ? "tcp" : svc->proto == IPPROTO_UDP ? "udp" : "sctp", text, ntohs(svc->port), svc->scheduler->name);
    list_for_each_entry (dest, &svc->dests, n_list) {
        inet_ntop(dest->af, &dest->addr, text, sizeof(text));
        fprintf(out,
                "%s{\"addr\":\"%s\",\"port\":%u,\"mode\":\"%s\",\"weight\":%d,\"actconns\":%d,\"inactconns\":%d,"
                "\"persistconns\":%d,\"conns\":%lu,\"inpkts\":%lu,\"outpkts\":%lu}",
                comma, text, ntohs(dest->port), mode_name(dest->fwdmode), rte_atomic16_read(&dest->weight),
                rte_atomic32_read(&dest->actconns), rte_atomic32_read(&dest->inactconns),
                rte_atomic32_read(&dest->persistconns), dest->stats.conns, dest->stats.inpkts, dest->stats.outpkts);
        comma = ",";
    }
    fprintf(out, "],\"laddrs\":[");
    comma = "";
    list_for_each_entry (laddr, &svc->laddr_list, list) {
        inet_ntop(laddr->af, &laddr->addr, text, sizeof(text));
        fprintf(out, "%s{\"addr\":\"%s\",\"conn_counts\":%d}", comma, text, rte_atomic32_read(&laddr->conn_counts));
        comma = ",";
    }
    fprintf(out, "]}");
}

void service_json(FILE *out)
{
    unsigned cid = rte_lcore_id();
    const char *comma = "";

    fprintf(out, "[");
    for (int i = 0; i < BUCKETS; i++) {
        struct dp_vs_service *svc;
        list_for_each_entry (svc, &table[cid][i], s_list) {
            fprintf(out, "%s", comma);
            one_service_json(out, svc);
            comma = ",";
        }
    }
    fprintf(out, "]");
}

/* The master's services, without the workers' counters. Who asks says how many there are, or is refused. */
static int list_services(const void *in, size_t inlen, void **out, size_t *outlen)
{
    const struct dp_vs_services_front *asked = in;
    struct dp_vs_services_front *front;
    struct dp_vs_service_compat *entry;
    struct dp_vs_service *svc;

    *outlen = 0;
    if (inlen != sizeof(*asked) || asked->index != 0 || asked->count != num_services[g_master_lcore_id])
        return EDPVS_INVAL;
    front = *out = rte_zmalloc("get_services", sizeof(*front) + asked->count * sizeof(*entry), 0);
    if (!front)
        return EDPVS_NOMEM;
    *outlen = sizeof(*front) + asked->count * sizeof(*entry);
    front->cid = (lcoreid_t)g_master_lcore_id;
    front->count = asked->count;
    entry = (struct dp_vs_service_compat *)(front + 1);
    for (int i = 0; i < BUCKETS; i++) {
        list_for_each_entry (svc, &table[g_master_lcore_id][i], s_list) {
            entry->af = svc->af;
            entry->proto = svc->proto;
            entry->port = svc->port;
            entry->flags = svc->flags;
            entry->conn_timeout = svc->conn_timeout;
            entry->addr = svc->addr;
            entry->num_dests = svc->num_dests;
            entry->num_laddrs = svc->num_laddrs;
            entry->cid = (lcoreid_t)g_master_lcore_id;
            entry++;
        }
    }
    return EDPVS_OK;
}

/* Of DPVS's service requests only those that ask for the release, the number of services and their list. */
static int svc_get(sockoptid_t opt, const void *in, size_t inlen, void **out, size_t *outlen)
{
    const struct dp_vs_getinfo info = {RELEASE_NUMBER, 0, num_services[g_master_lcore_id], g_slave_lcore_num};

    if (opt == DPVS_SO_GET_SERVICES)
        return list_services(in, inlen, out, outlen);
    if (opt != DPVS_SO_GET_VERSION && opt != DPVS_SO_GET_INFO)
        return EDPVS_INVAL;
    *outlen = opt == DPVS_SO_GET_VERSION ? 64 : sizeof(info);
    *out = rte_zmalloc("info", *outlen, 0);
    if (!*out)
        return EDPVS_NOMEM;
    if (opt == DPVS_SO_GET_VERSION)
        strcpy(*out, "dpvs:v" RELEASE);
    else
        memcpy(*out, &info, sizeof(info));
    return EDPVS_OK;
}

static int svc_set(sockoptid_t opt __rte_unused, const void *in __rte_unused, size_t inlen __rte_unused)
{
    return EDPVS_NOTSUPP;
}

static struct dpvs_sockopts sockopts_svc = {
    .version = SOCKOPT_VERSION,
    .set_opt_min = DPVS_SO_SET_FLUSH,
    .set_opt_max = SOCKOPT_SVC_MAX,
    .set = svc_set,
    .get_opt_min = DPVS_SO_SET_FLUSH,
    .get_opt_max = SOCKOPT_SVC_MAX,
    .get = svc_get,
};

int service_init(void)
{
    for (int cid = 0; cid < DPVS_MAX_LCORE; cid++)
        for (int i = 0; i < BUCKETS; i++)
            INIT_LIST_HEAD(&table[cid][i]);
    g_version = RELEASE_NUMBER;
    return sockopt_register(&sockopts_svc);
}
