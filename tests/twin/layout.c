/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The twin is of use only while its structs are DPVS 1.10.2's to the byte. Sizes, offsets and ids below are those
 * measured on a stock build (default config.mk, DPDK 24.11); the rte_mempool ones hold for this machine's DPDK as well
 * or it fails here.
 */
#include "dpvs.h"
#include "sockopts.h"

#define SIZE(type, bytes) _Static_assert(sizeof(struct type) == (bytes), "size of " #type)
#define FIELD(type, member, offset, bytes)                                                                             \
    _Static_assert(offsetof(struct type, member) == (offset) && sizeof(((struct type *)0)->member) == (bytes),         \
                   #type "." #member)

SIZE(dp_vs_conn, 576);
FIELD(dp_vs_conn, af, 0, 4);
FIELD(dp_vs_conn, proto, 4, 1);
FIELD(dp_vs_conn, caddr, 8, 16);
FIELD(dp_vs_conn, vaddr, 24, 16);
FIELD(dp_vs_conn, laddr, 40, 16);
FIELD(dp_vs_conn, daddr, 56, 16);
FIELD(dp_vs_conn, cport, 72, 2);
FIELD(dp_vs_conn, vport, 74, 2);
FIELD(dp_vs_conn, lport, 76, 2);
FIELD(dp_vs_conn, dport, 78, 2);
FIELD(dp_vs_conn, connpool, 80, 8);
FIELD(dp_vs_conn, tuplehash, 128, 128);
FIELD(dp_vs_conn, refcnt, 256, 4);
FIELD(dp_vs_conn, timer, 264, 48);
FIELD(dp_vs_conn, timeout, 312, 16);
FIELD(dp_vs_conn, lcore, 328, 1);
FIELD(dp_vs_conn, dest, 336, 8);
FIELD(dp_vs_conn, prot_data, 344, 8);
FIELD(dp_vs_conn, local, 352, 8);
FIELD(dp_vs_conn, fnat_seq, 360, 16);
FIELD(dp_vs_conn, rs_end_seq, 376, 4);
FIELD(dp_vs_conn, rs_end_ack, 380, 4);
FIELD(dp_vs_conn, packet_xmit, 384, 8);
FIELD(dp_vs_conn, packet_out_xmit, 392, 8);
FIELD(dp_vs_conn, in_smac, 400, 6);
FIELD(dp_vs_conn, in_dmac, 406, 6);
FIELD(dp_vs_conn, out_smac, 412, 6);
FIELD(dp_vs_conn, out_dmac, 418, 6);
FIELD(dp_vs_conn, in_dev, 424, 8);
FIELD(dp_vs_conn, out_dev, 432, 8);
FIELD(dp_vs_conn, in_nexthop, 440, 16);
FIELD(dp_vs_conn, out_nexthop, 456, 16);
FIELD(dp_vs_conn, syn_proxy_seq, 472, 16);
FIELD(dp_vs_conn, ack_mbuf, 488, 16);
FIELD(dp_vs_conn, ack_num, 504, 2);
FIELD(dp_vs_conn, wscale_vs, 506, 1);
FIELD(dp_vs_conn, wscale_rs, 507, 1);
FIELD(dp_vs_conn, syn_mbuf, 512, 8);
FIELD(dp_vs_conn, syn_retry_max, 520, 4);
FIELD(dp_vs_conn, last_seq, 524, 4);
FIELD(dp_vs_conn, last_ack_seq, 528, 4);
FIELD(dp_vs_conn, dup_ack_cnt, 532, 4);
FIELD(dp_vs_conn, pp_version, 536, 1);
FIELD(dp_vs_conn, pp_sent, 537, 1);
FIELD(dp_vs_conn, flags, 538, 2);
FIELD(dp_vs_conn, state, 540, 2);
FIELD(dp_vs_conn, old_state, 542, 2);
FIELD(dp_vs_conn, control, 544, 8);
FIELD(dp_vs_conn, n_control, 552, 4);
FIELD(dp_vs_conn, redirect, 560, 8);

SIZE(conn_tuple_hash, 64);
FIELD(conn_tuple_hash, list, 0, 16);
FIELD(conn_tuple_hash, direct, 16, 4);
FIELD(conn_tuple_hash, af, 20, 4);
FIELD(conn_tuple_hash, proto, 24, 1);
FIELD(conn_tuple_hash, saddr, 28, 16);
FIELD(conn_tuple_hash, daddr, 44, 16);
FIELD(conn_tuple_hash, sport, 60, 2);
FIELD(conn_tuple_hash, dport, 62, 2);

SIZE(dp_vs_seq, 16);
FIELD(dp_vs_seq, isn, 0, 4);
FIELD(dp_vs_seq, delta, 4, 4);
FIELD(dp_vs_seq, fdata_seq, 8, 4);
FIELD(dp_vs_seq, prev_delta, 12, 4);

SIZE(dpvs_timer, 48);
FIELD(dpvs_timer, list, 0, 16);
FIELD(dpvs_timer, handler, 16, 8);
FIELD(dpvs_timer, priv, 24, 8);
FIELD(dpvs_timer, is_period, 32, 1);
FIELD(dpvs_timer, delay, 36, 4);
FIELD(dpvs_timer, left, 40, 4);

SIZE(dp_vs_dest, 256);
FIELD(dp_vs_dest, n_list, 0, 16);
FIELD(dp_vs_dest, af, 16, 4);
FIELD(dp_vs_dest, addr, 20, 16);
FIELD(dp_vs_dest, port, 36, 2);
FIELD(dp_vs_dest, flags, 38, 2);
FIELD(dp_vs_dest, conn_flags, 40, 2);
FIELD(dp_vs_dest, weight, 42, 2);
FIELD(dp_vs_dest, refcnt, 44, 4);
FIELD(dp_vs_dest, stats, 48, 64);
FIELD(dp_vs_dest, fwdmode, 112, 4);
FIELD(dp_vs_dest, actconns, 116, 4);
FIELD(dp_vs_dest, inactconns, 120, 4);
FIELD(dp_vs_dest, persistconns, 124, 4);
FIELD(dp_vs_dest, max_conn, 128, 4);
FIELD(dp_vs_dest, min_conn, 132, 4);
FIELD(dp_vs_dest, proto, 136, 2);
FIELD(dp_vs_dest, vport, 138, 2);
FIELD(dp_vs_dest, vfwmark, 140, 4);
FIELD(dp_vs_dest, svc, 144, 8);
FIELD(dp_vs_dest, vaddr, 152, 16);
FIELD(dp_vs_dest, limit_proportion, 168, 4);
FIELD(dp_vs_dest, dfc, 176, 56);

SIZE(dp_vs_service, 320);
FIELD(dp_vs_service, s_list, 0, 16);
FIELD(dp_vs_service, f_list, 16, 16);
FIELD(dp_vs_service, m_list, 32, 16);
FIELD(dp_vs_service, refcnt, 48, 4);
FIELD(dp_vs_service, af, 52, 4);
FIELD(dp_vs_service, proto, 56, 1);
FIELD(dp_vs_service, proxy_protocol, 57, 1);
FIELD(dp_vs_service, port, 58, 2);
FIELD(dp_vs_service, fwmark, 60, 4);
FIELD(dp_vs_service, addr, 64, 16);
FIELD(dp_vs_service, match, 80, 8);
FIELD(dp_vs_service, flags, 88, 4);
FIELD(dp_vs_service, timeout, 92, 4);
FIELD(dp_vs_service, conn_timeout, 96, 4);
FIELD(dp_vs_service, bps, 100, 4);
FIELD(dp_vs_service, limit_proportion, 104, 4);
FIELD(dp_vs_service, netmask, 108, 4);
FIELD(dp_vs_service, dests, 112, 16);
FIELD(dp_vs_service, num_dests, 128, 4);
FIELD(dp_vs_service, weight, 136, 8);
FIELD(dp_vs_service, check_conf, 144, 8);
FIELD(dp_vs_service, scheduler, 152, 8);
FIELD(dp_vs_service, sched_data, 160, 8);
FIELD(dp_vs_service, stats, 168, 64);
FIELD(dp_vs_service, laddr_list, 232, 16);
FIELD(dp_vs_service, laddr_curr, 248, 8);
FIELD(dp_vs_service, num_laddrs, 256, 4);

SIZE(dp_vs_laddr, 56);
FIELD(dp_vs_laddr, af, 0, 4);
FIELD(dp_vs_laddr, list, 8, 16);
FIELD(dp_vs_laddr, addr, 24, 16);
FIELD(dp_vs_laddr, refcnt, 40, 4);
FIELD(dp_vs_laddr, conn_counts, 44, 4);
FIELD(dp_vs_laddr, iface, 48, 8);

SIZE(dp_vs_redirect, 64);
FIELD(dp_vs_redirect, list, 0, 16);
FIELD(dp_vs_redirect, af, 16, 1);
FIELD(dp_vs_redirect, proto, 17, 1);
FIELD(dp_vs_redirect, cid, 18, 1);
FIELD(dp_vs_redirect, padding, 19, 1);
FIELD(dp_vs_redirect, saddr, 20, 16);
FIELD(dp_vs_redirect, daddr, 36, 16);
FIELD(dp_vs_redirect, sport, 52, 2);
FIELD(dp_vs_redirect, dport, 54, 2);
FIELD(dp_vs_redirect, redirect_pool, 56, 8);

SIZE(dp_vs_conn_param, 32);
FIELD(dp_vs_conn_param, af, 0, 4);
FIELD(dp_vs_conn_param, proto, 4, 1);
FIELD(dp_vs_conn_param, caddr, 8, 8);
FIELD(dp_vs_conn_param, vaddr, 16, 8);
FIELD(dp_vs_conn_param, cport, 24, 2);
FIELD(dp_vs_conn_param, vport, 26, 2);
FIELD(dp_vs_conn_param, ct_dport, 28, 2);

SIZE(dp_vs_iphdr, 44);
FIELD(dp_vs_iphdr, af, 0, 4);
FIELD(dp_vs_iphdr, len, 4, 4);
FIELD(dp_vs_iphdr, proto, 8, 1);
FIELD(dp_vs_iphdr, saddr, 12, 16);
FIELD(dp_vs_iphdr, daddr, 28, 16);

SIZE(dpvs_sockopts, 56);
FIELD(dpvs_sockopts, version, 0, 4);
FIELD(dpvs_sockopts, list, 8, 16);
FIELD(dpvs_sockopts, set_opt_min, 24, 4);
FIELD(dpvs_sockopts, set_opt_max, 28, 4);
FIELD(dpvs_sockopts, set, 32, 8);
FIELD(dpvs_sockopts, get_opt_min, 40, 4);
FIELD(dpvs_sockopts, get_opt_max, 44, 4);
FIELD(dpvs_sockopts, get, 48, 8);

SIZE(dpvs_msg, 72);
FIELD(dpvs_msg, mq_node, 0, 16);
FIELD(dpvs_msg, type, 16, 4);
FIELD(dpvs_msg, seq, 20, 4);
FIELD(dpvs_msg, mode, 24, 4);
FIELD(dpvs_msg, cid, 28, 1);
FIELD(dpvs_msg, flags, 32, 4);
FIELD(dpvs_msg, refcnt, 36, 2);
FIELD(dpvs_msg, lock, 40, 4);
FIELD(dpvs_msg, reply, 48, 16);
FIELD(dpvs_msg, len, 64, 4);
_Static_assert(offsetof(struct dpvs_msg, data) == 68, "dpvs_msg.data");

SIZE(dpvs_msg_type, 56);
FIELD(dpvs_msg_type, type, 0, 4);
FIELD(dpvs_msg_type, prio, 4, 1);
FIELD(dpvs_msg_type, cid, 5, 1);
FIELD(dpvs_msg_type, mode, 8, 4);
FIELD(dpvs_msg_type, unicast_msg_cb, 16, 8);
FIELD(dpvs_msg_type, multicast_msg_cb, 24, 8);
FIELD(dpvs_msg_type, refcnt, 32, 4);
FIELD(dpvs_msg_type, list, 40, 16);

SIZE(dpvs_sock_msg, 24);
FIELD(dpvs_sock_msg, version, 0, 4);
FIELD(dpvs_sock_msg, id, 4, 4);
FIELD(dpvs_sock_msg, type, 8, 4);
FIELD(dpvs_sock_msg, len, 16, 8);
_Static_assert(offsetof(struct dpvs_sock_msg, data) == 24, "dpvs_sock_msg.data");

SIZE(dpvs_sock_msg_reply, 88);
FIELD(dpvs_sock_msg_reply, version, 0, 4);
FIELD(dpvs_sock_msg_reply, id, 4, 4);
FIELD(dpvs_sock_msg_reply, type, 8, 4);
FIELD(dpvs_sock_msg_reply, errcode, 12, 4);
FIELD(dpvs_sock_msg_reply, errstr, 16, 64);
FIELD(dpvs_sock_msg_reply, len, 80, 8);
_Static_assert(offsetof(struct dpvs_sock_msg_reply, data) == 88, "dpvs_sock_msg_reply.data");

SIZE(ip_vs_conn_entry, 104);
FIELD(ip_vs_conn_entry, in_af, 0, 2);
FIELD(ip_vs_conn_entry, out_af, 2, 2);
FIELD(ip_vs_conn_entry, proto, 4, 2);
FIELD(ip_vs_conn_entry, caddr, 8, 16);
FIELD(ip_vs_conn_entry, vaddr, 24, 16);
FIELD(ip_vs_conn_entry, laddr, 40, 16);
FIELD(ip_vs_conn_entry, daddr, 56, 16);
FIELD(ip_vs_conn_entry, cport, 72, 2);
FIELD(ip_vs_conn_entry, vport, 74, 2);
FIELD(ip_vs_conn_entry, lport, 76, 2);
FIELD(ip_vs_conn_entry, dport, 78, 2);
FIELD(ip_vs_conn_entry, timeout, 80, 4);
FIELD(ip_vs_conn_entry, lcoreid, 84, 1);
FIELD(ip_vs_conn_entry, state, 85, 16);

SIZE(ip_vs_conn_req, 48);
FIELD(ip_vs_conn_req, flag, 0, 4);
FIELD(ip_vs_conn_req, whence, 4, 4);
FIELD(ip_vs_conn_req, sockpair, 8, 40);

SIZE(ip_vs_sockpair, 40);
FIELD(ip_vs_sockpair, af, 0, 2);
FIELD(ip_vs_sockpair, proto, 2, 2);
FIELD(ip_vs_sockpair, sport, 4, 2);
FIELD(ip_vs_sockpair, tport, 6, 2);
FIELD(ip_vs_sockpair, sip, 8, 16);
FIELD(ip_vs_sockpair, tip, 24, 16);

SIZE(ip_vs_conn_array, 9);
FIELD(ip_vs_conn_array, nconns, 0, 4);
FIELD(ip_vs_conn_array, resl, 4, 4);
FIELD(ip_vs_conn_array, curcid, 8, 1);
_Static_assert(offsetof(struct ip_vs_conn_array, array) == 9, "ip_vs_conn_array.array");

SIZE(sa_pool, 104);
FIELD(sa_pool, ifa, 0, 8);
FIELD(sa_pool, low, 8, 2);
FIELD(sa_pool, high, 10, 2);
FIELD(sa_pool, refcnt, 12, 4);
FIELD(sa_pool, pool_hash, 16, 8);
FIELD(sa_pool, pool_hash_sz, 24, 1);
FIELD(sa_pool, flags, 28, 4);
FIELD(sa_pool, flow_num, 32, 4);
FIELD(sa_pool, flows, 40, 64);

SIZE(sa_entry, 40);
FIELD(sa_entry, list, 0, 16);
FIELD(sa_entry, flags, 16, 4);
FIELD(sa_entry, addr, 20, 16);
FIELD(sa_entry, port, 36, 2);

SIZE(sa_entry_pool, 56);
FIELD(sa_entry_pool, sa_entries, 0, 8);
FIELD(sa_entry_pool, used_enties, 8, 16);
FIELD(sa_entry_pool, free_enties, 24, 16);
FIELD(sa_entry_pool, used_cnt, 40, 2);
FIELD(sa_entry_pool, free_cnt, 42, 2);
FIELD(sa_entry_pool, miss_cnt, 44, 4);
FIELD(sa_entry_pool, shift, 48, 2);

SIZE(inet_ifaddr, 264);
FIELD(inet_ifaddr, d_list, 0, 16);
FIELD(inet_ifaddr, h_list, 16, 16);
FIELD(inet_ifaddr, idev, 32, 8);
FIELD(inet_ifaddr, af, 40, 4);
FIELD(inet_ifaddr, addr, 44, 16);
FIELD(inet_ifaddr, plen, 60, 1);
FIELD(inet_ifaddr, mask, 64, 16);
FIELD(inet_ifaddr, bcast, 80, 16);
FIELD(inet_ifaddr, scope, 96, 1);
FIELD(inet_ifaddr, flags, 100, 4);
FIELD(inet_ifaddr, refcnt, 104, 4);
FIELD(inet_ifaddr, valid_lft, 108, 4);
FIELD(inet_ifaddr, prefered_lft, 112, 4);
FIELD(inet_ifaddr, timer, 120, 48);
FIELD(inet_ifaddr, tstemp, 168, 16);
FIELD(inet_ifaddr, cstemp, 184, 16);
FIELD(inet_ifaddr, state, 200, 4);
FIELD(inet_ifaddr, dad_probes, 204, 1);
FIELD(inet_ifaddr, dad_timer, 208, 48);
FIELD(inet_ifaddr, sa_pool, 256, 8);

SIZE(rte_mempool, 192);
FIELD(rte_mempool, name, 0, 26);
FIELD(rte_mempool, pool_data, 32, 8);
FIELD(rte_mempool, pool_id, 32, 8);
FIELD(rte_mempool, pool_config, 40, 8);
FIELD(rte_mempool, mz, 48, 8);
FIELD(rte_mempool, flags, 56, 4);
FIELD(rte_mempool, socket_id, 60, 4);
FIELD(rte_mempool, size, 64, 4);
FIELD(rte_mempool, cache_size, 68, 4);
FIELD(rte_mempool, elt_size, 72, 4);
FIELD(rte_mempool, header_size, 76, 4);
FIELD(rte_mempool, trailer_size, 80, 4);
FIELD(rte_mempool, private_data_size, 84, 4);
FIELD(rte_mempool, ops_index, 88, 4);
FIELD(rte_mempool, local_cache, 96, 8);
FIELD(rte_mempool, populated_size, 104, 4);
FIELD(rte_mempool, elt_list, 112, 16);
FIELD(rte_mempool, nb_mem_chunks, 128, 4);
FIELD(rte_mempool, mem_list, 136, 16);

SIZE(rte_mempool_objhdr, 24);
FIELD(rte_mempool_objhdr, next, 0, 8);
FIELD(rte_mempool_objhdr, mp, 8, 8);
FIELD(rte_mempool_objhdr, iova, 16, 8);

SIZE(rte_mempool_memhdr, 56);
FIELD(rte_mempool_memhdr, next, 0, 8);
FIELD(rte_mempool_memhdr, mp, 8, 8);
FIELD(rte_mempool_memhdr, addr, 16, 8);
FIELD(rte_mempool_memhdr, iova, 24, 8);
FIELD(rte_mempool_memhdr, len, 32, 8);
FIELD(rte_mempool_memhdr, free_cb, 40, 8);
FIELD(rte_mempool_memhdr, opaque, 48, 8);

_Static_assert(SOCKOPT_GET_LADDR_GETALL == 3, "SOCKOPT_GET_LADDR_GETALL");
_Static_assert(DPVS_SO_GET_VERSION == 17, "DPVS_SO_GET_VERSION");
_Static_assert(DPVS_SO_GET_INFO == 18, "DPVS_SO_GET_INFO");
_Static_assert(DPVS_SO_GET_SERVICES == 19, "DPVS_SO_GET_SERVICES");
_Static_assert(DPVS_SO_GET_DESTS == 21, "DPVS_SO_GET_DESTS");
_Static_assert(SOCKOPT_GET_IFADDR_SHOW == 51, "SOCKOPT_GET_IFADDR_SHOW");
_Static_assert(SOCKOPT_NETIF_GET_LCORE_MASK == 57, "SOCKOPT_NETIF_GET_LCORE_MASK");
_Static_assert(SOCKOPT_SET_CONN == 89, "SOCKOPT_SET_CONN");
_Static_assert(SOCKOPT_GET_CONN_ALL == 90, "SOCKOPT_GET_CONN_ALL");
_Static_assert(SOCKOPT_GET_CONN_SPECIFIED == 91, "SOCKOPT_GET_CONN_SPECIFIED");
_Static_assert(SOCKOPT_VERSION == 65536, "SOCKOPT_VERSION");
