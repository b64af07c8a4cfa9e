/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One session, made, refreshed or ended by DPVS's own functions on the worker that owns it, or on each of them where
 * nobody can know (batch.c).
 *
 * Rules: everything here runs on that worker, between two bursts of packets, so nothing else touches its table, its port
 * pools or its lists of services. A TCP copy waits as SYNACK|INACTIVE and ends from CLOSE: no reset is sent from either.
 * A UDP copy waits as NONE: the first packet moves it on, and its end says nothing of its real server's health, which
 * that of ONEWAY would. An SCTP copy waits as NONE too: it ends in silence, and any chunk of an association moves it on
 * (1.10.2, src/ipvs/ip_vs_proto_sctp.c: sctp_states). Templates are another matter (template.c).
 */
#include <sys/socket.h>

#include "agent.h"

#define MAX_LADDRS 4096

/* The modes and families that DPVS can carry: 1.10.2, src/ipvs/ip_vs_xmit.c. */
static bool is_kind(const struct agent_record *r)
{
	bool same = r->af == r->af_out && (r->af == AF_INET || r->af == AF_INET6);

	switch (r->fwdmode) {
	case FWD_FNAT:
	case FWD_TUNNEL:
		return same || (r->af == AF_INET6 && r->af_out == AF_INET);
	case FWD_DR:
	case FWD_NAT:
		return same;
	default:
		return false;
	}
}

/* How a copy waits for its first packet. */
static uint16_t waiting_state(uint8_t proto) { return proto == IPPROTO_TCP ? TCP_SYNACK : UDP_NONE; }

static uint16_t last_state(uint8_t proto)
{
	return proto == IPPROTO_TCP ? TCP_SYNACK : proto == IPPROTO_SCTP ? SCTP_CLOSED : UDP_NORMAL;
}

/* The one state in which DPVS counts a session as active. UDP has none. */
static bool counts_as_active(uint8_t proto, uint16_t state)
{
	return (proto == IPPROTO_TCP && state == TCP_ESTABLISHED) || (proto == IPPROTO_SCTP && state == SCTP_ESTABLISHED);
}

uint8_t check_record(const struct agent_record *r)
{
	static const uint8_t nothing[sizeof(r->sp)];

	if (!is_kind(r) || (r->proto != IPPROTO_TCP && r->proto != IPPROTO_UDP && r->proto != IPPROTO_SCTP))
		return CODE_UNSUPPORTED;
	if (r->proto == IPPROTO_UDP && (!config.udp_waits || is_before_1_9_6()))
		return CODE_UNSUPPORTED;
	if (r->flags & F_ONE_PACKET)
		return CODE_UNSUPPORTED;
	if (r->flags & F_TEMPLATE)
		return check_template(r);
	if (!r->cport || !r->vport || !r->lport || !r->dport)
		return CODE_BAD_RECORD;
	if (r->state > last_state(r->proto))
		return CODE_BAD_RECORD;
	if (r->fwdmode != FWD_FNAT && (r->lport != r->cport || !address_equal(r->af_out, r->laddr, r->caddr)))
		return CODE_BAD_RECORD; /* no local address: DPVS writes the client's there, or what fits of it */
	if (!r->timeout_ms || r->timeout_ms / 1000 > AGENT_MAX_TIMEOUT_S || r->wscale_vs > 14 || r->wscale_rs > 14)
		return CODE_BAD_RECORD;
	if ((!HAS(dp_vs_conn, syn_proxy_seq) && (r->flags & F_SYNPROXY || memcmp(&r->sp, nothing, sizeof(r->sp)))) ||
	    (!HAS(dp_vs_conn, wscale_vs) && r->wscale_vs) || (!HAS(dp_vs_conn, wscale_rs) && r->wscale_rs) ||
	    (!HAS(dp_vs_conn, pp_version) && r->pp_version) || (!HAS(dp_vs_conn, pp_sent) && r->pp_sent))
		return CODE_UNSUPPORTED; /* it needs a field that is not there, or whose place is not proven */
	return 0;
}

static bool same_local_side(void *conn, const struct agent_record *r)
{
	return address_equal(r->af_out, AT(conn, dp_vs_conn, laddr), r->laddr) &&
	       address_equal(r->af_out, AT(conn, dp_vs_conn, daddr), r->daddr) &&
	       get16(AT(conn, dp_vs_conn, lport)) == r->lport && get16(AT(conn, dp_vs_conn, dport)) == r->dport;
}

/* Does the copy carry traffic here? Then DPVS itself has moved it out of the state that we put it in. */
static bool is_live(void *conn)
{
	uint8_t proto = get8(AT(conn, dp_vs_conn, proto));

	if (get16(AT(conn, dp_vs_conn, state)) != waiting_state(proto))
		return true;
	return proto == IPPROTO_TCP && !(get16(AT(conn, dp_vs_conn, flags)) & F_INACTIVE);
}

/* LIVE, or LIVE_UNHEARD where copies stand on every worker and the client has sent nothing to this one: a copy that was
 * claimed, or one of NAT, where what the real server sends may come to another worker than what the client sends, and
 * makes the copy there live. That worker may be without a copy (DPVS's redirect table takes the packet to the session),
 * the client's may not. A packet of the client leaves its traces in the Ethernet address of the way back or in the next
 * hop: 1.10.2, src/ipvs/ip_vs_xmit.c: dp_vs_save_xmit_info, dp_vs_conn_cache_rt. */
static uint8_t live_code(void *conn, const struct agent_record *r)
{
	static const uint8_t nothing[16];

	if (!without_owner(r) || memcmp(AT(conn, dp_vs_conn, out_dmac), nothing, MAC) != 0 ||
	    !address_equal(r->af_out, AT(conn, dp_vs_conn, in_nexthop), nothing))
		return CODE_LIVE;
	return CODE_LIVE_UNHEARD;
}

static void *find(const struct agent_record *r, int *direction)
{
	*direction = 0;
	return dpvs.dp_vs_conn_get(r->af, r->proto, r->caddr, r->vaddr, r->cport, r->vport, direction, false);
}

/* Ends a session now and without a word on the network; takes the reference that the caller holds. */
static bool end_silently(void *conn)
{
	int (*handler)(void *) = (int (*)(void *))getp(
		(char *)AT(conn, dp_vs_conn, timer) + config.offsets[OFF_dpvs_timer_handler]);

	if (!handler || get32(AT(conn, dp_vs_conn, n_control)) != 0) {
		dpvs.dp_vs_conn_put_no_reset(conn);
		return false;
	}
	if (get8(AT(conn, dp_vs_conn, proto)) == IPPROTO_TCP)
		put16(AT(conn, dp_vs_conn, state), TCP_CLOSE); /* no reset from this state */
	dpvs.dp_vs_conn_put_no_reset(conn);
	return handler(conn) == DTIMER_STOP;
}

static void fill(void *conn, const struct agent_record *r)
{
	struct timeval *timeout = AT(conn, dp_vs_conn, timeout);
	uint16_t flags = get16(AT(conn, dp_vs_conn, flags));

	memcpy(AT(conn, dp_vs_conn, fnat_seq), &r->fnat, sizeof(r->fnat));
	if (HAS(dp_vs_conn, syn_proxy_seq))
		memcpy(AT(conn, dp_vs_conn, syn_proxy_seq), &r->sp, sizeof(r->sp));
	put32(AT(conn, dp_vs_conn, rs_end_seq), r->rs_end_seq);
	put32(AT(conn, dp_vs_conn, rs_end_ack), r->rs_end_ack);
	if (HAS(dp_vs_conn, wscale_vs))
		put8(AT(conn, dp_vs_conn, wscale_vs), r->wscale_vs);
	if (HAS(dp_vs_conn, wscale_rs))
		put8(AT(conn, dp_vs_conn, wscale_rs), r->wscale_rs);
	if (HAS(dp_vs_conn, pp_version))
		put8(AT(conn, dp_vs_conn, pp_version), r->pp_version);
	if (HAS(dp_vs_conn, pp_sent))
		put8(AT(conn, dp_vs_conn, pp_sent), r->pp_sent);
	put16(AT(conn, dp_vs_conn, state), waiting_state(r->proto));
	put16(AT(conn, dp_vs_conn, old_state), waiting_state(r->proto));
	/* after dp_vs_conn_new: with SYNPROXY among its arguments it would parse a packet that is not there */
	flags = (flags & ~(F_SYNPROXY | F_QUIESCENT)) | (r->flags & (F_SYNPROXY | F_QUIESCENT)) | F_INACTIVE;
	put16(AT(conn, dp_vs_conn, flags), flags);
	timeout->tv_sec = r->timeout_ms / 1000 ? r->timeout_ms / 1000 : 1;
	timeout->tv_usec = 0;
	dpvs.dp_vs_conn_put(conn); /* restarts its timer with this timeout, drops our reference */
}

/* By which real server a port's pool is chosen: DPVS 1.10.2, src/sa_pool.c: sa_pool_hash. */
static uint32_t pool_key(const struct agent_record *r)
{
	uint32_t words[5] = { r->dport };

	if (r->af_out == AF_INET6) {
		memcpy(&words[1], r->daddr, 16);
		return hash_words(words, 5, AF_INET6);
	}
	memcpy(words, r->daddr, 4);
	return (ntohl(words[0]) & 0xffff) + ntohs(r->dport);
}

/* The local port's entry in this worker's pool; NULL and a code where it cannot be had. */
static void *free_port(const struct agent_record *r, void *laddr, uint8_t *code, struct list_head **free_list)
{
	void *ifa, *pool, *bucket, *entry;
	uint32_t port = ntohs(r->lport);
	unsigned shift, hash_size;

	ifa = dpvs.inet_addr_ifa_get(r->af_out, getp(AT(laddr, dp_vs_laddr, iface)), (void *)(uintptr_t)r->laddr);
	if (!ifa) {
		*code = CODE_NO_LADDR;
		return NULL;
	}
	if (get32(AT(ifa, inet_ifaddr, af)) != r->af_out ||
	    !address_equal(r->af_out, AT(ifa, inet_ifaddr, addr), r->laddr)) {
		dpvs.inet_addr_ifa_put(ifa);
		*code = poison("the interface address of a local address is not where the layout says");
		return NULL;
	}
	pool = getp(AT(ifa, inet_ifaddr, sa_pool));
	dpvs.inet_addr_ifa_put(ifa); /* the address list of this worker still holds it */
	if (!pool) {
		*code = CODE_NO_LADDR;
		return NULL;
	}
	hash_size = get8(AT(pool, sa_pool, pool_hash_sz));
	if (getp(AT(pool, sa_pool, ifa)) != ifa || hash_size == 0 || hash_size > 128) {
		*code = poison("the port pool of a local address is not where the layout says");
		return NULL;
	}
	if (port < get16(AT(pool, sa_pool, low)) || port > get16(AT(pool, sa_pool, high))) {
		*code = CODE_BAD_RECORD;
		return NULL;
	}
	bucket = (char *)getp(AT(pool, sa_pool, pool_hash)) + SIZE_OF(sa_entry_pool) * (pool_key(r) % hash_size);
	shift = get16(AT(bucket, sa_entry_pool, shift));
	if (shift > 6) {
		*code = poison("a port pool has a shift of %u", shift);
		return NULL;
	}
	if ((port >> shift) >= (65536u >> shift)) {
		*code = CODE_BAD_RECORD;
		return NULL;
	}
	entry = (char *)getp(AT(bucket, sa_entry_pool, sa_entries)) + SIZE_OF(sa_entry) * (port >> shift);
	if (get16(AT(entry, sa_entry, port)) != r->lport) {
		*code = CODE_WRONG_WORKER;
		return NULL;
	}
	if (!address_equal(r->af_out, AT(entry, sa_entry, addr), r->laddr)) {
		*code = poison("an entry of a port pool does not carry its pool's address");
		return NULL;
	}
	if (get32(AT(entry, sa_entry, flags)) & SA_F_USED) {
		*code = CODE_PORT_BUSY;
		return NULL;
	}
	*free_list = AT(bucket, sa_entry_pool, free_enties);
	return AT(entry, sa_entry, list);
}

static void move_to_head(struct list_head *entry, struct list_head *list)
{
	entry->prev->next = entry->next;
	entry->next->prev = entry->prev;
	entry->next = list->next;
	entry->prev = list;
	list->next->prev = entry;
	list->next = entry;
}

struct steering {
	void *svc, *saved_curr;
	struct list_head *node, *saved_next, fake;
};

/* DPVS takes the head of the free list of the next local address in the round (sa_pool_fetch, __get_laddr, which may
 * step twice): make both the ones that the record names, let dp_vs_conn_new choose as ever, and put the round back
 * (release). A code, and nothing changed, if they cannot be had. */
static uint8_t steer(struct steering *s, void *svc, const struct agent_record *r, void **found)
{
	struct list_head *entry, *free_list, *node;
	unsigned i, limit = get32(AT(svc, dp_vs_service, num_laddrs));
	void *laddr = NULL;
	uint8_t code = 0;

	if (limit > MAX_LADDRS)
		return poison("a service has %u local addresses", limit);
	node = ((struct list_head *)AT(svc, dp_vs_service, laddr_list))->next;
	for (i = 0; i < limit && node != AT(svc, dp_vs_service, laddr_list); i++, node = node->next) {
		laddr = (char *)node - config.offsets[OFF_dp_vs_laddr_list];
		if (get32(AT(laddr, dp_vs_laddr, af)) == r->af_out &&
		    address_equal(r->af_out, AT(laddr, dp_vs_laddr, addr), r->laddr))
			break;
		laddr = NULL;
	}
	if (!laddr)
		return CODE_NO_LADDR;
	entry = free_port(r, laddr, &code, &free_list);
	if (!entry)
		return code;
	move_to_head(entry, free_list);
	s->svc = svc;
	s->saved_curr = getp(AT(svc, dp_vs_service, laddr_curr));
	s->node = node;
	s->saved_next = node->next;
	s->fake.next = s->fake.prev = node;
	node->next = node;
	putp(AT(svc, dp_vs_service, laddr_curr), &s->fake);
	*found = laddr;
	return 0;
}

static void release(struct steering *s)
{
	s->node->next = s->saved_next;
	putp(AT(s->svc, dp_vs_service, laddr_curr), s->saved_curr);
}

static uint8_t create(const struct agent_record *r, unsigned lcore, struct ahead *ahead)
{
	static __thread uint64_t packet[64], iph[8], param[8]; /* never parsed for these modes with ct_dport set */
	struct steering steering;
	void *svc, *dest, *laddr = NULL, *conn, *template;
	uint8_t code;

	svc = find_service(r, lcore);
	if (!svc)
		return CODE_NO_SERVICE;
	if (get32(AT(svc, dp_vs_service, af)) != r->af || get8(AT(svc, dp_vs_service, proto)) != r->proto)
		return poison("a service is not laid out as expected");
	dest = dpvs.dp_vs_dest_lookup(r->af_out, svc, r->daddr, r->dport);
	if (!dest)
		return CODE_NO_DEST;
	if (getp(AT(dest, dp_vs_dest, svc)) != svc || get16(AT(dest, dp_vs_dest, port)) != r->dport ||
	    !address_equal(r->af_out, AT(dest, dp_vs_dest, addr), r->daddr))
		return poison("a real server is not laid out as expected");
	if (get32(AT(dest, dp_vs_dest, fwdmode)) != r->fwdmode)
		return CODE_MODE_MISMATCH;
	if (is_full(dest))
		return CODE_OVERLOAD;

	put32(AT(param, dp_vs_conn_param, af), r->af);
	put8(AT(param, dp_vs_conn_param, proto), r->proto);
	putp(AT(param, dp_vs_conn_param, caddr), (void *)(uintptr_t)r->caddr);
	putp(AT(param, dp_vs_conn_param, vaddr), (void *)(uintptr_t)r->vaddr);
	put16(AT(param, dp_vs_conn_param, cport), r->cport);
	put16(AT(param, dp_vs_conn_param, vport), r->vport);
	put16(AT(param, dp_vs_conn_param, ct_dport), r->dport);
	if (r->fwdmode == FWD_FNAT) {
		code = steer(&steering, svc, r, &laddr);
		if (code)
			return code;
		template = template_for(r, svc, dest);
		conn = dpvs.dp_vs_conn_new(packet, iph, param, dest, F_INJECTED);
		release(&steering);
	} else {
		template = template_for(r, svc, dest);
		conn = dpvs.dp_vs_conn_new(packet, iph, param, dest, F_INJECTED);
	}
	if (template)
		tie(conn, template);
	if (!conn)
		return CODE_NO_MEMORY;
	if (!same_local_side(conn, r) || getp(AT(conn, dp_vs_conn, dest)) != dest ||
	    getp(AT(conn, dp_vs_conn, local)) != laddr || get8(AT(conn, dp_vs_conn, proto)) != r->proto ||
	    !address_equal(r->af, AT(conn, dp_vs_conn, caddr), r->caddr) ||
	    !address_equal(r->af, AT(conn, dp_vs_conn, vaddr), r->vaddr) ||
	    !(get16(AT(conn, dp_vs_conn, flags)) & F_INJECTED)) {
		end_silently(conn);
		return poison("a session that DPVS made for us is not the one we asked for");
	}
	ahead_learn(ahead, conn, r);
	fill(conn, r);
	return CODE_CREATED;
}

uint8_t upsert_session(const struct agent_record *r, unsigned lcore, struct ahead *ahead)
{
	int direction;
	void *conn = find(r, &direction);

	if (conn) {
		if (direction != 0 || !(get16(AT(conn, dp_vs_conn, flags)) & F_INJECTED)) {
			dpvs.dp_vs_conn_put_no_reset(conn);
			return CODE_FOREIGN;
		}
		if (is_live(conn)) {
			dpvs.dp_vs_conn_put_no_reset(conn);
			return live_code(conn, r);
		}
		if (same_local_side(conn, r)) {
			fill(conn, r);
			return CODE_UPDATED;
		}
		if (!end_silently(conn)) /* the client's port has a new session behind it */
			return CODE_BUSY;
	}
	return create(r, lcore, ahead);
}

/* Our copy of exactly this session, held; NULL and a code where there is none. */
static void *find_own(const struct agent_record *r, uint8_t *code)
{
	int direction;
	void *conn = find(r, &direction);

	if (!conn) {
		*code = CODE_ABSENT;
		return NULL;
	}
	if (direction != 0 || !(get16(AT(conn, dp_vs_conn, flags)) & F_INJECTED)) {
		dpvs.dp_vs_conn_put_no_reset(conn);
		*code = CODE_FOREIGN;
		return NULL;
	}
	if (!same_local_side(conn, r)) { /* a later session of the same client port */
		dpvs.dp_vs_conn_put_no_reset(conn);
		*code = CODE_ABSENT;
		return NULL;
	}
	return conn;
}

uint8_t look_at_session(const struct agent_record *r)
{
	uint8_t code;
	void *conn = find_own(r, &code);

	if (!conn)
		return code;
	code = is_live(conn) ? live_code(conn, r) : CODE_WAITING;
	dpvs.dp_vs_conn_put_no_reset(conn);
	return code;
}

uint8_t withdraw_session(const struct agent_record *r, bool unheard)
{
	uint8_t code;
	void *conn = find_own(r, &code);

	if (!conn)
		return code;
	code = is_live(conn) ? live_code(conn, r) : CODE_WAITING;
	if (code == CODE_LIVE || (code == CODE_LIVE_UNHEARD && !unheard)) {
		dpvs.dp_vs_conn_put_no_reset(conn);
		return code;
	}
	return end_silently(conn) ? CODE_DELETED : CODE_BUSY;
}

uint64_t address_of_session(const struct agent_record *r)
{
	int direction;
	void *conn = find(r, &direction);

	if (conn)
		dpvs.dp_vs_conn_put_no_reset(conn);
	return (uint64_t)(uintptr_t)conn;
}

uint8_t delete_session(const struct agent_record *r) { return withdraw_session(r, false); }

uint8_t merge_codes(uint64_t seen)
{
	uint64_t failed = seen >> CODE_NO_SERVICE << CODE_NO_SERVICE;

	if (seen & (1ull << CODE_LIVE | 1ull << CODE_LIVE_UNHEARD))
		return CODE_LIVE;
	if (failed) /* the worst: what will never work before what may */
		return (uint8_t)(63 - __builtin_clzll(failed));
	if (seen & 1ull << CODE_YIELDED)
		return CODE_YIELDED;
	if (seen & 1ull << CODE_FOREIGN)
		return CODE_FOREIGN;
	if (seen & 1ull << CODE_WAITING)
		return CODE_WAITING;
	if (seen & 1ull << CODE_UPDATED)
		return CODE_UPDATED;
	if (seen & 1ull << CODE_CREATED)
		return CODE_CREATED;
	return seen & 1ull << CODE_DELETED ? CODE_DELETED : CODE_ABSENT;
}

/* What a session has learned of its ways: DPVS learns it again with its next packets (1.10.2, src/ipvs/ip_vs_xmit.c), by
 * then the neighbours may be others, and traces of the client that are older than that would say that it is here. */
static void forget_ways(void *conn)
{
	memset(AT(conn, dp_vs_conn, in_smac), 0, MAC);
	memset(AT(conn, dp_vs_conn, in_dmac), 0, MAC);
	memset(AT(conn, dp_vs_conn, out_smac), 0, MAC);
	memset(AT(conn, dp_vs_conn, out_dmac), 0, MAC);
	memset(AT(conn, dp_vs_conn, in_nexthop), 0, 16);
	memset(AT(conn, dp_vs_conn, out_nexthop), 0, 16);
}

/* Another node has the packets of this session now: what stands here becomes a copy that waits. It ends in silence, and
 * its first packet makes it live again, so nothing is lost if that node is wrong. The record names the session and tells
 * for how long to keep it; all else of it is what DPVS knows. */
uint8_t yield_session(const struct agent_record *r)
{
	int direction;
	void *conn = find(r, &direction), *dest;
	struct timeval *timeout;
	uint16_t flags, state;

	if (!conn)
		return CODE_ABSENT;
	flags = get16(AT(conn, dp_vs_conn, flags));
	state = get16(AT(conn, dp_vs_conn, state));
	dest = getp(AT(conn, dp_vs_conn, dest));
	if (direction != 0 || !dest || (flags & (F_TEMPLATE | F_ONE_PACKET))) {
		dpvs.dp_vs_conn_put_no_reset(conn);
		return CODE_FOREIGN;
	}
	if (r->proto == IPPROTO_TCP && (state == TCP_NONE || state == TCP_SYN_SENT)) {
		/* it holds packets of its handshake: DPVS 1.10.2, src/ipvs/ip_vs_synproxy.c */
		dpvs.dp_vs_conn_put_no_reset(conn);
		return CODE_BUSY;
	}
	if (!address_equal((int)get32(AT(dest, dp_vs_dest, af)), AT(dest, dp_vs_dest, addr), AT(conn, dp_vs_conn, daddr)) ||
	    (!(flags & F_INACTIVE) && (int32_t)get32(AT(dest, dp_vs_dest, actconns)) <= 0)) {
		dpvs.dp_vs_conn_put_no_reset(conn);
		return poison("the real server of a session is not laid out as expected");
	}
	if (!(flags & F_INACTIVE)) {
		/* as where DPVS leaves ESTABLISHED: 1.10.2, src/ipvs/ip_vs_proto_tcp.c: tcp_state_trans */
		__atomic_fetch_sub((uint32_t *)AT(dest, dp_vs_dest, actconns), 1, __ATOMIC_SEQ_CST);
		__atomic_fetch_add((uint32_t *)AT(dest, dp_vs_dest, inactconns), 1, __ATOMIC_SEQ_CST);
	}
	/* flags first: who reads this memory meanwhile sees a session that was carried on, and not one that is opening */
	put16(AT(conn, dp_vs_conn, flags), flags | F_INACTIVE | F_INJECTED);
	put16(AT(conn, dp_vs_conn, state), waiting_state(r->proto));
	put16(AT(conn, dp_vs_conn, old_state), waiting_state(r->proto));
	forget_ways(conn);
	timeout = AT(conn, dp_vs_conn, timeout);
	timeout->tv_sec = r->timeout_ms / 1000 ? r->timeout_ms / 1000 : 1;
	timeout->tv_usec = 0;
	dpvs.dp_vs_conn_put(conn);
	return CODE_YIELDED;
}

/* The owner of this session is dead for good, and no other node has its packets: a copy that waits is the session now, in
 * the state that the record tells, until its time is over. Its timer is not touched: it has been silent all that while. */
uint8_t claim_session(const struct agent_record *r)
{
	int direction;
	void *conn = find(r, &direction), *dest;
	uint16_t flags, state = r->proto == IPPROTO_UDP ? UDP_NORMAL : r->state;
	uint8_t code = CODE_LIVE;

	if (!conn)
		return CODE_ABSENT;
	flags = get16(AT(conn, dp_vs_conn, flags));
	dest = getp(AT(conn, dp_vs_conn, dest));
	if (direction != 0 || !dest || !(flags & F_INJECTED) || !same_local_side(conn, r)) {
		code = CODE_FOREIGN;
	} else if (!is_live(conn)) {
		if (counts_as_active(r->proto, state) && (flags & F_INACTIVE)) {
			/* as where DPVS enters ESTABLISHED: 1.10.2, src/ipvs/ip_vs_proto_tcp.c: tcp_state_trans */
			__atomic_fetch_add((uint32_t *)AT(dest, dp_vs_dest, actconns), 1, __ATOMIC_SEQ_CST);
			__atomic_fetch_sub((uint32_t *)AT(dest, dp_vs_dest, inactconns), 1, __ATOMIC_SEQ_CST);
			put16(AT(conn, dp_vs_conn, flags), flags & ~F_INACTIVE);
		}
		put16(AT(conn, dp_vs_conn, state), state);
	}
	dpvs.dp_vs_conn_put_no_reset(conn);
	return code;
}
