/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The control socket (DPVS src/ctrl.c): one request a connection, read whole, blocking, in the master's loop, one
 * connection waiting. Handlers cover ranges of ids; the SET of the one that covers SOCKOPT_SET_CONN is empty and is
 * called all the same, so that request ends the process by SIGSEGV, as on a stock DPVS. Error paths index the table of
 * names by id.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/un.h>
#include <unistd.h>

#include <rte_debug.h>
#include <rte_eal.h>

#include "sockopts.h"
#include "twin.h"

#define SOCKOPT_NAME(name) #name,
const char *dpvs_sockopts_name[] = {SOCKOPT_NAMES(SOCKOPT_NAME)};

static struct list_head handlers = LIST_HEAD_INIT(handlers);
static int server = -1;

static bool between(sockoptid_t id, sockoptid_t low, sockoptid_t high)
{
    return id >= low && id <= high;
}

static bool overlap(sockoptid_t low, sockoptid_t high, sockoptid_t other_low, sockoptid_t other_high)
{
    return between(low, other_low, other_high) || between(high, other_low, other_high) ||
           between(other_low, low, high) || between(other_high, low, high);
}

int sockopt_register(struct dpvs_sockopts *sockopts)
{
    struct dpvs_sockopts *other;

    if (!sockopts)
        return EDPVS_INVAL;
    list_for_each_entry (other, &handlers, list) {
        if (overlap(sockopts->set_opt_min, sockopts->set_opt_max, other->set_opt_min, other->set_opt_max) ||
            overlap(sockopts->get_opt_min, sockopts->get_opt_max, other->get_opt_min, other->get_opt_max))
            rte_exit(EXIT_FAILURE, "sockopt type already exist ->\n\t\tget: %s - %s\n\t\tset: %s - %s\n",
                     dpvs_sockopts_name[sockopts->get_opt_min], dpvs_sockopts_name[sockopts->get_opt_max],
                     dpvs_sockopts_name[sockopts->set_opt_min], dpvs_sockopts_name[sockopts->set_opt_max]);
    }
    list_add_tail(&sockopts->list, &handlers);
    return EDPVS_OK;
}

int sockopt_unregister(struct dpvs_sockopts *sockopts)
{
    struct dpvs_sockopts *other, *next;

    if (!sockopts)
        return EDPVS_INVAL;
    list_for_each_entry_safe (other, next, &handlers, list) {
        if (other == sockopts) {
            list_del_init(&other->list);
            return EDPVS_OK;
        }
    }
    return EDPVS_NOTEXIST;
}

/* NULL, and with it no answer at all, for an id nobody covers and for a version that is not the handler's. */
static struct dpvs_sockopts *find(const struct dpvs_sock_msg *msg)
{
    struct dpvs_sockopts *opts;

    list_for_each_entry (opts, &handlers, list) {
        bool covers = false;

        if (msg->type == SOCKOPT_GET)
            covers = between(msg->id, opts->get_opt_min, opts->get_opt_max);
        else if (msg->type == SOCKOPT_SET)
            covers = between(msg->id, opts->set_opt_min, opts->set_opt_max);
        if (!covers)
            continue;
        if (opts->version == msg->version)
            return opts;
        LOG(WARNING, "%s: socket msg version not match\n", __func__);
        return NULL;
    }
    return NULL;
}

static struct dpvs_sock_msg *receive(int client)
{
    struct dpvs_sock_msg header, *msg;
    ssize_t got;

    memset(&header, 0, sizeof(header));
    got = readn(client, &header, sizeof(header));
    if (got != (ssize_t)sizeof(header)) {
        LOG(WARNING, "%s: sockopt msg header recv fail -- %zd/%zu recieved\n", __func__, got, sizeof(header));
        return NULL;
    }
    msg = rte_malloc("sockopt_msg", sizeof(header) + header.len, RTE_CACHE_LINE_SIZE);
    if (!msg) {
        LOG(ERR, "%s: no memory\n", __func__);
        return NULL;
    }
    memcpy(msg, &header, sizeof(header));
    got = header.len ? readn(client, msg->data, header.len) : 0;
    if (got != (ssize_t)header.len) {
        LOG(WARNING, "%s: sockopt[%s] msg body recv fail -- %zd/%zu recieved\n", __func__, dpvs_sockopts_name[msg->id],
            got, header.len);
        rte_free(msg);
        return NULL;
    }
    return msg;
}

static void answer(int client, const struct dpvs_sock_msg *msg, int err, const void *data, size_t len)
{
    struct dpvs_sock_msg_reply header;

    memset(&header, 0, sizeof(header));
    header.version = SOCKOPT_VERSION;
    header.id = msg->id;
    header.type = msg->type;
    header.errcode = err;
    snprintf(header.errstr, sizeof(header.errstr), "%s", dpvs_strerror(err));
    header.len = len;
    if (sendn(client, &header, sizeof(header), MSG_NOSIGNAL) != (ssize_t)sizeof(header)) {
        LOG(WARNING, "[%s:msg#%s] sockopt reply msg header send error\n", __func__, dpvs_sockopts_name[header.id]);
        return;
    }
    if (err == 0 && len && sendn(client, data, len, MSG_NOSIGNAL) != (ssize_t)len)
        LOG(WARNING, "[%s:msg#%s] sockopt reply msg body send error\n", __func__, dpvs_sockopts_name[header.id]);
}

static void serve(int client)
{
    struct dpvs_sock_msg *msg = receive(client);
    struct dpvs_sockopts *opts = msg ? find(msg) : NULL;
    void *data = NULL;
    size_t len = 0;

    if (opts) {
        int err = msg->type == SOCKOPT_GET ? opts->get(msg->id, msg->data, msg->len, &data, &len)
                                           : opts->set(msg->id, msg->data, msg->len);
        if (err < 0)
            data = NULL, len = 0; /* a handler that fails frees its own */
        answer(client, msg, err, data, len);
        rte_free(data);
    }
    rte_free(msg);
}

static void sockopt_job_func(void *dummy __rte_unused)
{
    int client = accept(server, NULL, NULL); /* the server does not block, the client does */

    if (client < 0) {
        if (errno != EWOULDBLOCK)
            LOG(WARNING, "%s: Fail to accept client request\n", __func__);
        return;
    }
    twin_worked();
    serve(client);
    close(client);
}

static struct dpvs_lcore_job sockopt_job = {.name = "sockopt_job", .type = LCORE_JOB_LOOP, .func = sockopt_job_func};

int sockopt_init(void)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};

    server = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (server < 0)
        return EDPVS_IO;
    snprintf(addr.sun_path, sizeof(addr.sun_path), "%s", dpvs_ipc_file);
    unlink(dpvs_ipc_file);
    if (bind(server, (struct sockaddr *)&addr, sizeof(addr)) < 0 || listen(server, 1) < 0) {
        LOG(ERR, "%s: %s: %m\n", __func__, dpvs_ipc_file);
        return EDPVS_IO;
    }
    return dpvs_lcore_job_register(&sockopt_job, LCORE_ROLE_MASTER);
}

void sockopt_term(void)
{
    close(server);
    unlink(dpvs_ipc_file);
}

/* DPVS's memory statistics (src/eal_mem.c): here only so that the list holds another handler with an empty SET. */
static int eal_mem_get(sockoptid_t opt __rte_unused, const void *in __rte_unused, size_t inlen __rte_unused,
                       void **out __rte_unused, size_t *outlen __rte_unused)
{
    return EDPVS_NOTSUPP;
}

static struct dpvs_sockopts eal_mem_sockopts = {
    .version = SOCKOPT_VERSION,
    .set_opt_min = SOCKOPT_SET_EAL_MEM_NONE,
    .set_opt_max = SOCKOPT_SET_EAL_MEM_NONE,
    .set = NULL,
    .get_opt_min = SOCKOPT_GET_EAL_MEM_SEG,
    .get_opt_max = SOCKOPT_GET_EAL_MEM_POOL,
    .get = eal_mem_get,
};

int eal_mem_sockopt_init(void)
{
    return sockopt_register(&eal_mem_sockopts);
}
