/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Templates: what ties the clients of a persistent service to their real servers (DPVS 1.10.2, src/ipvs/ip_vs_core.c:
 * dp_vs_sched_persist). A template has a client's network, no client's port, and no port of the real server.
 *
 * Rules: they stand in one table of all workers, behind a lock, and their timers are the master's. So any worker may make
 * one, and none may end one: its timer is told to do that a moment later, on the master. Two workers that look for the
 * same one and make it would make two; that is what our own lock is for (DPVS has none there).
 *
 * A template carries no packets, so nothing shows that it is in use here but the sessions that it controls. It ends with
 * its owner's, and as long as it controls sessions DPVS keeps it alive by itself (ip_vs_conn.c: dp_vs_conn_expire).
 */
#include <sys/socket.h>

#include "agent.h"

#define MAX_DESTS 65536
#define ENDING_US 1000

static uint32_t making; /* the lock */

static void lock(void)
{
	while (__atomic_exchange_n(&making, 1, __ATOMIC_ACQUIRE))
		__builtin_ia32_pause();
}

static void unlock(void) { __atomic_store_n(&making, 0, __ATOMIC_RELEASE); }

/* Whether the fields of a service are known by which templates are made. */
static bool known(void)
{
	return HAS(dp_vs_service, flags) && HAS(dp_vs_service, timeout) && HAS(dp_vs_service, netmask);
}

uint8_t check_template(const struct agent_record *r)
{
	if (!known())
		return CODE_UNSUPPORTED;
	if (!r->vport) /* of a service of all ports: no release lets anybody configure one */
		return CODE_UNSUPPORTED;
	if (r->cport || r->lport || r->dport || !r->timeout_ms || r->timeout_ms / 1000 > AGENT_MAX_TIMEOUT_S)
		return CODE_BAD_RECORD;
	return 0;
}

/* What a client's address is to a service, as in dp_vs_sched_persist: IPv4 by a mask, IPv6 by a length of a prefix. */
static void network_of(int af, const uint8_t *client, void *svc, uint8_t *network)
{
	uint32_t mask = get32(AT(svc, dp_vs_service, netmask)), bits, address;

	memset(network, 0, 16);
	if (af == AF_INET) {
		memcpy(&address, client, 4);
		address &= mask;
		memcpy(network, &address, 4);
		return;
	}
	bits = mask < 128 ? mask : 128;
	memcpy(network, client, bits / 8);
	if (bits % 8)
		network[bits / 8] = client[bits / 8] & (uint8_t)(0xff << (8 - bits % 8));
}

static void *find(const struct agent_record *r, const uint8_t *network)
{
	return dpvs.dp_vs_ct_in_get(r->af, r->proto, network, r->vaddr, 0, r->vport);
}

/* With a new time until its end; takes the reference that the caller holds. */
static void put(void *template, uint64_t seconds, unsigned microseconds)
{
	struct timeval *timeout = AT(template, dp_vs_conn, timeout);

	timeout->tv_sec = (time_t)seconds;
	timeout->tv_usec = microseconds;
	dpvs.dp_vs_conn_put(template);
}

static bool is_to(void *template, int af_out, const void *address)
{
	return address_equal(af_out, AT(template, dp_vs_conn, daddr), address);
}

/* Held, with DPVS's own first time-out; NULL and a code where there is none. */
static void *make(const struct agent_record *r, const uint8_t *network, void *dest, uint8_t *code)
{
	static __thread uint64_t packet[64], iph[8], param[8]; /* never parsed for a template */
	void *template;

	if (is_full(dest)) {
		*code = CODE_OVERLOAD;
		return NULL;
	}
	put32(AT(param, dp_vs_conn_param, af), r->af);
	put8(AT(param, dp_vs_conn_param, proto), r->proto);
	putp(AT(param, dp_vs_conn_param, caddr), (void *)(uintptr_t)network);
	putp(AT(param, dp_vs_conn_param, vaddr), (void *)(uintptr_t)r->vaddr);
	put16(AT(param, dp_vs_conn_param, cport), 0);
	put16(AT(param, dp_vs_conn_param, vport), r->vport);
	put16(AT(param, dp_vs_conn_param, ct_dport), 0);
	template = dpvs.dp_vs_conn_new(packet, iph, param, dest, F_INJECTED | F_TEMPLATE | (r->flags & F_QUIESCENT));
	if (!template) {
		*code = CODE_NO_MEMORY;
		return NULL;
	}
	if (getp(AT(template, dp_vs_conn, dest)) != dest || !is_to(template, r->af_out, r->daddr) ||
	    !address_equal(r->af, AT(template, dp_vs_conn, caddr), network) ||
	    (get16(AT(template, dp_vs_conn, flags)) & (F_INJECTED | F_TEMPLATE)) != (F_INJECTED | F_TEMPLATE)) {
		put(template, 0, ENDING_US);
		*code = poison("a template that DPVS made for us is not the one we asked for");
		return NULL;
	}
	return template;
}

void *template_for(const struct agent_record *r, void *svc, void *dest)
{
	uint8_t network[16], code;
	void *template;

	if (!known() || !(get32(AT(svc, dp_vs_service, flags)) & SVC_PERSISTENT))
		return NULL;
	network_of(r->af, r->caddr, svc, network);
	lock();
	template = find(r, network);
	if (!template) {
		template = make(r, network, dest, &code);
		if (template) {
			struct timeval *timeout = AT(template, dp_vs_conn, timeout);

			timeout->tv_sec = get32(AT(svc, dp_vs_service, timeout));
			timeout->tv_usec = 0;
		}
	} else if (!is_to(template, r->af_out, r->daddr)) { /* the client is tied to another one by now */
		dpvs.dp_vs_conn_put_no_reset(template);
		template = NULL;
	}
	unlock();
	return template;
}

void tie(void *conn, void *template)
{
	if (conn) {
		putp(AT(conn, dp_vs_conn, control), template);
		__atomic_fetch_add((uint32_t *)AT(template, dp_vs_conn, n_control), 1, __ATOMIC_SEQ_CST);
	}
	dpvs.dp_vs_conn_put(template);
}

/* A template names no port of its real server: the one of this address, where there is only one. */
static uint8_t dest_by_address(const struct agent_record *r, void *svc, void **found)
{
	struct list_head *list = AT(svc, dp_vs_service, dests), *node = list->next;
	unsigned i, count = get32(AT(svc, dp_vs_service, num_dests));
	void *dest;

	*found = NULL;
	if (count > MAX_DESTS)
		return poison("a service has %u real servers", count);
	for (i = 0; i < count && node != list; i++, node = node->next) {
		dest = (char *)node - config.offsets[OFF_dp_vs_dest_n_list];
		if (getp(AT(dest, dp_vs_dest, svc)) != svc)
			return poison("the real servers of a service are not where the layout says");
		if (get32(AT(dest, dp_vs_dest, af)) != r->af_out ||
		    !address_equal(r->af_out, AT(dest, dp_vs_dest, addr), r->daddr))
			continue;
		if (*found)
			return CODE_NO_DEST;
		*found = dest;
	}
	if (!*found)
		return CODE_NO_DEST;
	return get32(AT(*found, dp_vs_dest, fwdmode)) == r->fwdmode ? 0 : CODE_MODE_MISMATCH;
}

static uint8_t create(const struct agent_record *r, unsigned lcore)
{
	void *svc, *dest, *template;
	uint8_t code;

	svc = find_service(r, lcore);
	if (!svc || !(get32(AT(svc, dp_vs_service, flags)) & SVC_PERSISTENT))
		return CODE_NO_SERVICE;
	code = dest_by_address(r, svc, &dest);
	if (code)
		return code;
	template = make(r, r->caddr, dest, &code);
	if (!template)
		return code;
	put(template, r->timeout_ms / 1000 ? r->timeout_ms / 1000 : 1, 0);
	return CODE_CREATED;
}

static uint8_t upsert(const struct agent_record *r, unsigned lcore)
{
	void *template = find(r, r->caddr);

	if (!template)
		return create(r, lcore);
	if (!(get16(AT(template, dp_vs_conn, flags)) & F_INJECTED)) {
		dpvs.dp_vs_conn_put_no_reset(template);
		return CODE_FOREIGN;
	}
	if (!is_to(template, r->af_out, r->daddr)) { /* another real server: as soon as this one has ended */
		if (get32(AT(template, dp_vs_conn, n_control)) == 0)
			put(template, 0, ENDING_US);
		else
			dpvs.dp_vs_conn_put_no_reset(template);
		return CODE_BUSY;
	}
	put(template, r->timeout_ms / 1000 ? r->timeout_ms / 1000 : 1, 0);
	return CODE_UPDATED;
}

uint8_t work_on_template(const struct agent_record *r, uint8_t op, unsigned lcore)
{
	uint8_t code = CODE_FOREIGN;
	void *template;
	uint16_t flags;

	if (op == AGENT_UPSERT) {
		lock();
		code = upsert(r, lcore);
		unlock();
		return code;
	}
	template = find(r, r->caddr);
	if (!template)
		return CODE_ABSENT;
	flags = get16(AT(template, dp_vs_conn, flags));
	if (op == AGENT_YIELD) {
		put16(AT(template, dp_vs_conn, flags), flags | F_INJECTED);
		code = CODE_YIELDED;
	} else if ((flags & F_INJECTED) && !is_to(template, r->af_out, r->daddr)) {
		code = CODE_ABSENT;
	} else if (flags & F_INJECTED) {
		switch (op) {
		case AGENT_DELETE:
			put(template, 0, ENDING_US);
			return CODE_DELETED;
		case AGENT_CLAIM:
			put16(AT(template, dp_vs_conn, flags), flags & ~F_INJECTED);
			code = CODE_LIVE;
			break;
		default:
			code = CODE_WAITING;
		}
	}
	dpvs.dp_vs_conn_put_no_reset(template);
	return code;
}

uint64_t address_of_template(const struct agent_record *r)
{
	void *template = find(r, r->caddr);

	if (template)
		dpvs.dp_vs_conn_put_no_reset(template);
	return (uint64_t)(uintptr_t)template;
}
