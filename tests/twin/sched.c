/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Schedulers rr, wrr, wlc (DPVS src/ipvs/ip_vs_{sched,rr,wrr,wlc}.c). Workers start at servers spread over the list. */
#include "twin.h"

static bool usable(const struct dp_vs_dest *dest)
{
    return (dest->flags & DPVS_DEST_F_AVAILABLE) && !(dest->flags & (DPVS_DEST_F_OVERLOAD | DPVS_DEST_F_INHIBITED)) &&
           rte_atomic16_read(&dest->weight) > 0;
}

static struct dp_vs_dest *dest_of(struct list_head *node)
{
    return list_entry(node, struct dp_vs_dest, n_list);
}

struct list_head *dp_vs_sched_first_dest(const struct dp_vs_service *svc)
{
    unsigned workers = RTE_MAX(g_slave_lcore_num, 1), dests = RTE_MAX(svc->num_dests, 1u);
    unsigned share = RTE_MAX(svc->num_dests / workers, 1u);
    struct list_head *node = svc->dests.next;

    for (unsigned i = share * (unsigned)g_lcore_id2index[rte_lcore_id()] % dests; i > 0; i--) {
        node = node->next;
        if (node == &svc->dests)
            node = node->next;
    }
    return node;
}

/* rr: sched_data is the node served last. */

static int rr_init(struct dp_vs_service *svc)
{
    svc->sched_data = dp_vs_sched_first_dest(svc);
    return EDPVS_OK;
}

static int rr_update(struct dp_vs_service *svc, struct dp_vs_dest *dest __rte_unused, sockoptid_t opt __rte_unused)
{
    return rr_init(svc);
}

static struct dp_vs_dest *rr_schedule(struct dp_vs_service *svc, const struct rte_mbuf *mbuf __rte_unused,
                                      const struct dp_vs_iphdr *iph __rte_unused)
{
    struct list_head *start = ((struct list_head *)svc->sched_data)->next, *node = start;

    do {
        if (node != &svc->dests && usable(dest_of(node))) {
            svc->sched_data = node;
            return dest_of(node);
        }
        node = node->next;
    } while (node != start);
    return NULL;
}

/* wrr: rounds of falling weight, from the greatest down by the greatest common divisor. */

struct wrr_mark {
    struct list_head *at;
    int weight;
    int greatest;
    int step;
};

static int gcd(int a, int b)
{
    while (b) {
        int rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

static int wrr_update(struct dp_vs_service *svc, struct dp_vs_dest *changed __rte_unused, sockoptid_t opt __rte_unused)
{
    struct wrr_mark *mark = svc->sched_data;
    struct dp_vs_dest *dest;

    mark->at = dp_vs_sched_first_dest(svc);
    mark->greatest = mark->step = 0;
    list_for_each_entry (dest, &svc->dests, n_list) {
        int weight = rte_atomic16_read(&dest->weight);
        mark->greatest = RTE_MAX(mark->greatest, weight);
        mark->step = gcd(mark->step, weight);
    }
    mark->step = RTE_MAX(mark->step, 1);
    if (mark->weight > mark->greatest)
        mark->weight = 0;
    return EDPVS_OK;
}

static int wrr_init(struct dp_vs_service *svc)
{
    svc->sched_data = rte_zmalloc("wrr_mark", sizeof(struct wrr_mark), RTE_CACHE_LINE_SIZE);
    return svc->sched_data ? wrr_update(svc, NULL, 0) : EDPVS_NOMEM;
}

static int wrr_exit(struct dp_vs_service *svc)
{
    rte_free(svc->sched_data);
    return EDPVS_OK;
}

static struct dp_vs_dest *wrr_schedule(struct dp_vs_service *svc, const struct rte_mbuf *mbuf __rte_unused,
                                       const struct dp_vs_iphdr *iph __rte_unused)
{
    struct wrr_mark *mark = svc->sched_data;
    int rounds = mark->greatest / mark->step + 2; /* enough to see every server at every weight */

    if (list_empty(&svc->dests) || mark->greatest == 0)
        return NULL;
    while (rounds > 0) {
        if (mark->at == &svc->dests) {
            mark->weight -= mark->step;
            if (mark->weight <= 0)
                mark->weight = mark->greatest;
            rounds--;
        }
        mark->at = mark->at->next;
        if (mark->at != &svc->dests && usable(dest_of(mark->at)) &&
            rte_atomic16_read(&dest_of(mark->at)->weight) >= mark->weight)
            return dest_of(mark->at);
    }
    return NULL;
}

/* wlc: the least (active * 256 + inactive) / weight. */

static int64_t load_of(struct dp_vs_dest *dest)
{
    return ((int64_t)rte_atomic32_read(&dest->actconns) << 8) + rte_atomic32_read(&dest->inactconns);
}

static struct dp_vs_dest *wlc_schedule(struct dp_vs_service *svc, const struct rte_mbuf *mbuf __rte_unused,
                                       const struct dp_vs_iphdr *iph __rte_unused)
{
    struct list_head *first = dp_vs_sched_first_dest(svc), *node = first;
    struct dp_vs_dest *least = NULL;

    do {
        if (node != &svc->dests && usable(dest_of(node))) {
            struct dp_vs_dest *dest = dest_of(node);
            if (!least ||
                load_of(least) * rte_atomic16_read(&dest->weight) > load_of(dest) * rte_atomic16_read(&least->weight))
                least = dest;
        }
        node = node->next;
    } while (node != first);
    return least;
}

static struct dp_vs_scheduler schedulers[] = {
    {.name = "rr", .schedule = rr_schedule, .init_service = rr_init, .update_service = rr_update},
    {.name = "wrr",
     .schedule = wrr_schedule,
     .init_service = wrr_init,
     .exit_service = wrr_exit,
     .update_service = wrr_update},
    {.name = "wlc", .schedule = wlc_schedule},
};

struct dp_vs_scheduler *dp_vs_scheduler_get(const char *name)
{
    for (size_t i = 0; i < RTE_DIM(schedulers); i++)
        if (!strcmp(schedulers[i].name, name))
            return &schedulers[i];
    return NULL;
}
