/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * IPv6 neighbours (RFC 4861; DPVS src/ipv6/ndisc.c): solicitations for our addresses are answered, ours are sent to the
 * solicited-node group. No duplicate address detection, no router discovery.
 */
#include "twin.h"

enum { SOLICITATION = 135, ADVERTISEMENT = 136, OPT_SOURCE = 1, OPT_TARGET = 2, HOPS = 255 };
#define SOLICITED_OVERRIDE 0x60000000u

struct nd {
    uint8_t type;
    uint8_t code;
    uint16_t checksum;
    uint32_t flags;
    struct in6_addr target;
    uint8_t opt; /* one option, of the Ethernet address, if it is there at all */
    uint8_t opt_len;
    struct rte_ether_addr mac;
};

static void copy16(void *to, const void *from)
{
    memcpy(to, from, 16);
}

static void send_nd(uint8_t type, uint32_t flags, const union inet_addr *from, const void *to, const void *target,
                    const struct rte_ether_addr *mac)
{
    struct rte_mbuf *mbuf = rte_pktmbuf_alloc(twin_port->mbuf_pool);
    struct rte_ipv6_hdr *iph;
    struct nd *nd;

    iph = mbuf ? (struct rte_ipv6_hdr *)rte_pktmbuf_append(mbuf, sizeof(*iph) + sizeof(*nd)) : NULL;
    if (!iph) {
        rte_pktmbuf_free(mbuf);
        return;
    }
    nd = (struct nd *)(iph + 1);
    memset(iph, 0, sizeof(*iph) + sizeof(*nd));
    iph->vtc_flow = htonl(6u << 28);
    iph->payload_len = htons(sizeof(*nd));
    iph->proto = IPPROTO_ICMPV6;
    iph->hop_limits = HOPS;
    copy16(&iph->src_addr, from);
    copy16(&iph->dst_addr, to);
    nd->type = type;
    nd->flags = htonl(flags);
    copy16(&nd->target, target);
    nd->opt = type == SOLICITATION ? OPT_SOURCE : OPT_TARGET;
    nd->opt_len = 1;
    nd->mac = twin_port->addr;
    nd->checksum = rte_ipv6_udptcp_cksum(iph, nd);
    net_xmit_to(mbuf, mac, RTE_ETHER_TYPE_IPV6);
}

void ndisc_ask(const union inet_addr *source, const union inet_addr *target)
{
    struct in6_addr group = {.s6_addr = {0xff, 2, [11] = 1, 0xff}};
    struct rte_ether_addr mac = {{0x33, 0x33, 0xff}};

    memcpy(&group.s6_addr[13], &target->in6.s6_addr[13], 3);
    memcpy(&mac.addr_bytes[3], &target->in6.s6_addr[13], 3);
    send_nd(SOLICITATION, 0, source, &group, target, &mac);
}

/* Takes the packet over, which is ICMPv6 of any sort. */
void ndisc_input(struct rte_mbuf *mbuf)
{
    const struct rte_ipv6_hdr *iph = ip6_hdr(mbuf);
    const struct nd *nd = mbuf_header(mbuf, sizeof(*iph), offsetof(struct nd, opt));
    const struct nd *whole = mbuf_header(mbuf, sizeof(*iph), sizeof(*nd));
    union inet_addr source, target;

    if (nd && iph->hop_limits == HOPS) {
        copy16(&source, &iph->src_addr);
        copy16(&target, &nd->target);
        if (nd->type == SOLICITATION && whole && nd->opt == OPT_SOURCE && ifa_is_local(AF_INET6, &target)) {
            net_heard(AF_INET6, &source, &whole->mac);
            send_nd(ADVERTISEMENT, SOLICITED_OVERRIDE, &target, &source, &target, &whole->mac);
        } else if (nd->type == ADVERTISEMENT && whole && nd->opt == OPT_TARGET) {
            net_heard(AF_INET6, &target, &whole->mac);
        }
    }
    rte_pktmbuf_free(mbuf);
}
