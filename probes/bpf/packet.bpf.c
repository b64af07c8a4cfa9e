// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Packets to the services of a DPVS, as an interface that the kernel sees receives them: when a flow was seen last, how
 * many packets and bytes, which TCP flags. Every packet goes on as it came. No packet data leaves the kernel.
 *
 * Given by probes/packets.py:  FLOWS          flows that are kept; beyond them the longest silent ones make room
 *                              SERVICES       services that can be watched
 *                              COUNTER_SLOTS  16 counters for each possible CPU
 * struct flow_key, flow and service are FLOW_KEY, FLOW and SERVICE of probes/flow.py, the order of the counters is
 * COUNTERS of probes/packets.py.
 *
 * Every packet ends in exactly one of COUNTED ... DEEP. Checksums are not looked at.
 */
#include <uapi/linux/ptrace.h>

enum { PACKETS, COUNTED, UNWATCHED, NOT_IP, OTHER_PROTOCOL, FRAGMENTS, MALFORMED, DEEP, NEW, RENEWED, NO_ROOM, BYTES, SLOTS = 16 };

#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86dd
#define TAGS 2 /* of VLANs */
#define EXTENSIONS 8 /* headers of IPv6 between its own and the transport's */

enum { AF_IPV4 = 2, AF_IPV6 = 10, PROTO_TCP = 6, PROTO_UDP = 17 };
enum { HOP_BY_HOP = 0, ROUTING = 43, FRAGMENT = 44, AUTHENTICATION = 51, DESTINATION = 60 };
enum { FIN = 1, SYN = 2, RST = 4, ACK = 16 };

/* Addresses and ports as the packet has them; an IPv4 address in the first word, zeros after it. */
struct flow_key {
	u32 saddr[4];
	u32 daddr[4];
	u16 sport;
	u16 dport;
	u8 proto;
	u8 af;
	u16 zero;
};

struct flow {
	u64 first_ns; /* CLOCK_MONOTONIC */
	u64 last_ns;
	u64 packets;
	u64 bytes; /* of whole frames */
	u32 flags; /* of TCP, all that were seen */
	u32 zero;
};

struct service {
	u32 addr[4];
	u16 port;
	u8 proto;
	u8 af;
};

struct ethernet {
	u8 addresses[12];
	u16 type;
};

struct vlan {
	u16 tag;
	u16 type;
};

struct ipv4 {
	u8 version_length;
	u8 tos;
	u16 length;
	u16 id;
	u16 fragment;
	u8 ttl;
	u8 proto;
	u16 checksum;
	u32 saddr;
	u32 daddr;
};

struct ipv6 {
	u8 version_class;
	u8 class_label[3];
	u16 length;
	u8 next;
	u8 hops;
	u32 saddr[4];
	u32 daddr[4];
};

struct extension {
	u8 next;
	u8 length;
	u16 offset; /* of a fragment */
	u32 rest;
};

struct tcp {
	u16 sport;
	u16 dport;
	u32 seq;
	u32 ack;
	u8 length;
	u8 flags;
	u16 window;
	u32 rest;
};

struct udp {
	u16 sport;
	u16 dport;
	u16 length;
	u16 checksum;
};

BPF_TABLE("lru_hash", struct flow_key, struct flow, flows, FLOWS);
BPF_TABLE("hash", struct service, u32, services, SERVICES);
/* Mappable, so that user space reads the counters without a system call; two cache lines for each CPU. */
BPF_F_TABLE("array", u32, u64, counters, COUNTER_SLOTS, BPF_F_MMAPABLE);

static inline void add(u32 which, u64 number)
{
	u32 key = bpf_get_smp_processor_id() * SLOTS + which;
	u64 *counter = counters.lookup(&key);

	if (counter)
		*counter += number; /* nothing interrupts us but what cannot come here */
}

static inline void count(u32 which)
{
	add(which, 1);
}

static inline int watched(struct flow_key *key)
{
	struct service service = {};

	service.addr[0] = key->daddr[0];
	service.addr[1] = key->daddr[1];
	service.addr[2] = key->daddr[2];
	service.addr[3] = key->daddr[3];
	service.port = key->dport;
	service.proto = key->proto;
	service.af = key->af;
	return services.lookup(&service) != 0;
}

static inline u32 note(struct flow_key *key, u32 bytes, u8 flags)
{
	u64 now = bpf_ktime_get_ns();
	struct flow *flow = flows.lookup(key);

	add(BYTES, bytes);
	if (!flow) {
		struct flow fresh = {.first_ns = now, .last_ns = now, .packets = 1, .bytes = bytes, .flags = flags};

		if (!flows.insert(key, &fresh)) {
			count(NEW);
			return COUNTED;
		}
		flow = flows.lookup(key); /* another CPU was first */
		if (!flow) {
			count(NO_ROOM);
			return COUNTED;
		}
	}
	flow->last_ns = now;
	if ((flags & (SYN | ACK)) == SYN && (flow->flags & (FIN | RST))) {
		/* A new connection from a port that had one: what is said of a flow is said of the last one. */
		flow->first_ns = now;
		flow->packets = 1;
		flow->bytes = bytes;
		flow->flags = flags;
		count(RENEWED);
		return COUNTED;
	}
	__sync_fetch_and_add(&flow->packets, 1);
	__sync_fetch_and_add(&flow->bytes, bytes);
	if ((flow->flags & flags) != flags)
		flow->flags |= flags;
	return COUNTED;
}

/* ``left``: bytes of the datagram from ``at`` on, as its IP header says. */
static inline u32 transport(struct flow_key *key, void *at, void *end, int left, u32 bytes)
{
	u8 flags = 0;

	if (key->proto == PROTO_TCP) {
		struct tcp *tcp = at;

		if (left < (int)sizeof(*tcp) || (void *)(tcp + 1) > end || tcp->length >> 4 < 5 || (tcp->length >> 4) * 4 > left)
			return MALFORMED;
		key->sport = tcp->sport;
		key->dport = tcp->dport;
		flags = tcp->flags;
	} else if (key->proto == PROTO_UDP) {
		struct udp *udp = at;

		if (left < (int)sizeof(*udp) || (void *)(udp + 1) > end || bpf_ntohs(udp->length) < sizeof(*udp))
			return MALFORMED;
		key->sport = udp->sport;
		key->dport = udp->dport;
	} else {
		return OTHER_PROTOCOL;
	}
	return watched(key) ? note(key, bytes, flags) : UNWATCHED;
}

static inline u32 over_ipv4(struct flow_key *key, void *at, void *end, u32 present, u32 bytes)
{
	struct ipv4 *ip = at;
	u32 header, length;

	if ((void *)(ip + 1) > end)
		return MALFORMED;
	header = (ip->version_length & 15) * 4;
	length = bpf_ntohs(ip->length);
	if (ip->version_length >> 4 != 4 || header < sizeof(*ip) || length < header || length > present)
		return MALFORMED;
	if (ip->fragment & bpf_htons(0x1fff))
		return FRAGMENTS; /* has no ports */
	key->saddr[0] = ip->saddr;
	key->daddr[0] = ip->daddr;
	key->proto = ip->proto;
	key->af = AF_IPV4;
	return transport(key, at + header, end, length - header, bytes);
}

static inline u32 over_ipv6(struct flow_key *key, void *at, void *end, u32 present, u32 bytes)
{
	struct ipv6 *ip = at;
	int left;
	u8 next;

	if ((void *)(ip + 1) > end)
		return MALFORMED;
	left = bpf_ntohs(ip->length);
	if (ip->version_class >> 4 != 6 || left + sizeof(*ip) > present)
		return MALFORMED;
	key->saddr[0] = ip->saddr[0];
	key->saddr[1] = ip->saddr[1];
	key->saddr[2] = ip->saddr[2];
	key->saddr[3] = ip->saddr[3];
	key->daddr[0] = ip->daddr[0];
	key->daddr[1] = ip->daddr[1];
	key->daddr[2] = ip->daddr[2];
	key->daddr[3] = ip->daddr[3];
	key->af = AF_IPV6;
	next = ip->next;
	at = ip + 1;
#pragma unroll
	for (int i = 0; i <= EXTENSIONS; i++) {
		struct extension *header = at;
		u32 length;

		if (next != HOP_BY_HOP && next != ROUTING && next != FRAGMENT && next != AUTHENTICATION && next != DESTINATION)
			break;
		if (i == EXTENSIONS)
			return DEEP;
		if (left < (int)sizeof(*header) || (void *)(header + 1) > end)
			return MALFORMED;
		if (next == FRAGMENT && (header->offset & bpf_htons(0xfff8)))
			return FRAGMENTS;
		length = next == FRAGMENT	  ? 8
			 : next == AUTHENTICATION ? (header->length + 2) * 4
						  : (header->length + 1) * 8;
		if ((int)length > left)
			return MALFORMED;
		next = header->next;
		left -= length;
		at += length;
	}
	key->proto = next;
	return transport(key, at, end, left, bytes);
}

static inline u32 frame(struct xdp_md *ctx)
{
	void *at = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	u32 bytes = end - at, headers = sizeof(struct ethernet);
	struct ethernet *ethernet = at;
	struct flow_key key = {};
	u16 type;

	if ((void *)(ethernet + 1) > end)
		return NOT_IP;
	type = ethernet->type;
	at = ethernet + 1;
#pragma unroll
	for (int i = 0; i < TAGS; i++) {
		struct vlan *vlan = at;

		if (type != bpf_htons(0x8100) && type != bpf_htons(0x88a8) && type != bpf_htons(0x9100))
			break;
		if ((void *)(vlan + 1) > end)
			return MALFORMED;
		type = vlan->type;
		at = vlan + 1;
		headers += sizeof(*vlan);
	}
	if (type == bpf_htons(ETHERTYPE_IPV4))
		return over_ipv4(&key, at, end, bytes - headers, bytes);
	if (type == bpf_htons(ETHERTYPE_IPV6))
		return over_ipv6(&key, at, end, bytes - headers, bytes);
	return NOT_IP;
}

int packet(struct xdp_md *ctx)
{
	count(PACKETS);
	count(frame(ctx));
	return XDP_PASS;
}
