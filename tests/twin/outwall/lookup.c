/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The lookup of services as it was before 1.9.6: one argument more. The twin's own has another name in this variant. */
#include "../dpvs.h"

struct dp_vs_service *twin_service_lookup(int af, uint16_t protocol, const union inet_addr *vaddr, uint16_t vport,
                                          uint32_t fwmark, const struct rte_mbuf *mbuf, const struct dp_vs_match *match,
                                          lcoreid_t cid);
struct dp_vs_service *lookup(int af, uint16_t protocol, const union inet_addr *vaddr, uint16_t vport, uint32_t fwmark,
                             const struct rte_mbuf *mbuf, const struct dp_vs_match *match, bool *outwall,
                             lcoreid_t cid) __asm__("dp_vs_service_lookup");

struct dp_vs_service *lookup(int af, uint16_t protocol, const union inet_addr *vaddr, uint16_t vport, uint32_t fwmark,
                             const struct rte_mbuf *mbuf, const struct dp_vs_match *match, bool *outwall, lcoreid_t cid)
{
    *outwall = false;
    return twin_service_lookup(af, protocol, vaddr, vport, fwmark, mbuf, match, cid);
}
