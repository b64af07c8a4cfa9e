/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The twin's own control, <ipc>.twin: one line in, one line of JSON out, then closed. It stands for ipvsadm and dpip,
 * which are not at hand in a continuous-integration run. A change is made on the master and, by a multicast message, on
 * every worker, since each lcore has its own services and addresses; "stats" asks the workers one by one.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_addr.h>
#include <stdlib.h>
#include <sys/un.h>
#include <unistd.h>

#include <rte_random.h>

#include "twin.h"

#define MSG_TYPE_TWIN_SET 9001
#define MSG_TYPE_TWIN_STATS 9002
#define MAX_WORDS 12

enum op {
    ADDR_ADD,
    ADDR_DEL,
    SERVICE_ADD,
    SERVICE_DEL,
    DEST_ADD,
    DEST_EDIT,
    DEST_DEL,
    LADDR_ADD,
    LADDR_DEL,
    TIMEOUT,
    PERSIST,
    SYNPROXY,
    SYNTHESIZE,
    FLUSH,
    SEED,
};

struct command {
    enum op op;
    int af; /* of the service, or of the address where there is none */
    int proto;
    union inet_addr vip;
    uint16_t vport;
    struct dest_spec dest;
    int addr_af;
    union inet_addr addr;
    uint8_t plen;
    uint32_t flags;
    char sched[16];
    uint64_t count;
    uint64_t rate;
    uint32_t number;
};

static int server = -1;

/* On each lcore. */

static struct dp_vs_service *service_of(const struct command *c)
{
    return dp_vs_service_lookup(c->af, (uint16_t)c->proto, &c->vip, c->vport, 0, NULL, NULL,
                                (lcoreid_t)rte_lcore_id());
}

static int on_service(const struct command *c)
{
    struct dp_vs_service *svc = service_of(c);
    int err;

    if (!svc)
        return EDPVS_NOSERV;
    switch (c->op) {
    case DEST_ADD:
    case DEST_EDIT:
        return dest_add(svc, &c->dest, c->op == DEST_EDIT);
    case DEST_DEL:
        return dest_del(svc, &c->dest);
    case LADDR_ADD: /* an address of the port as well, with local ports, as ipvsadm --add-laddr makes it */
        err = ifa_add(c->addr_af, &c->addr, c->addr_af == AF_INET ? 32 : 128, IFA_F_SAPOOL);
        if (err != EDPVS_OK && err != EDPVS_EXIST)
            return err;
        return dp_vs_laddr_add(svc, c->addr_af, &c->addr, twin_port->name);
    case LADDR_DEL:
        return dp_vs_laddr_del(svc, c->addr_af, &c->addr);
    case PERSIST:
        svc->timeout = c->number;
        svc->flags = c->number ? svc->flags | DP_VS_SVC_F_PERSISTENT : svc->flags & ~(unsigned)DP_VS_SVC_F_PERSISTENT;
        return EDPVS_OK;
    case SYNPROXY:
        svc->flags = c->number ? svc->flags | DP_VS_SVC_F_SYNPROXY : svc->flags & ~(unsigned)DP_VS_SVC_F_SYNPROXY;
        return EDPVS_OK;
    default: /* TIMEOUT */
        svc->conn_timeout = c->number;
        return EDPVS_OK;
    }
}

static int apply(const struct command *c)
{
    switch (c->op) {
    case ADDR_ADD:
        return ifa_add(c->addr_af, &c->addr, c->plen, c->flags);
    case ADDR_DEL:
        return ifa_del(c->addr_af, &c->addr, c->plen);
    case SERVICE_ADD:
        return service_add(c->af, c->proto, &c->vip, c->vport, c->sched);
    case SERVICE_DEL:
        return service_del(c->af, c->proto, &c->vip, c->vport);
    case SYNTHESIZE:
        return on_master() ? EDPVS_OK : synthesize_start(c->count, c->rate, c->number, 0);
    case FLUSH:
        if (!on_master())
            conn_flush_this();
        return EDPVS_OK;
    case SEED:
        if (on_master()) {
            srandom(c->number);
            srand48((long)c->number);
            rte_srand(c->number);
        }
        return EDPVS_OK;
    default:
        return on_service(c);
    }
}

static int on_set(struct dpvs_msg *msg)
{
    struct command c;

    assert(msg->len == sizeof(c));
    memcpy(&c, msg->data, sizeof(c));
    return apply(&c);
}

/* The text is the C library's memory; the master frees it. */
static int on_stats(struct dpvs_msg *msg)
{
    struct lcore_stats *s = this_stats;
    char *text = NULL;
    size_t len;
    FILE *out = open_memstream(&text, &len);

    if (!out)
        return EDPVS_NOMEM;
    fprintf(out,
            "{\"lcore\":%u,\"conn_count\":%u,\"ticks\":%lu,\"rx\":%lu,\"tx\":%lu,\"dropped\":%lu,\"no_route\":%lu,"
            "\"redirected\":%lu,\"resets\":%lu,\"bad_acks\":%lu,\"reused\":%lu,\"synthetic\":%lu,"
            "\"synthetic_failed\":%lu,\"synthetic_pending\":%lu,\"longest_round_us\":%lu,\"addresses\":",
            rte_lcore_id(), conn_this_count(), twin_ticks(), s->rx, s->tx, s->dropped, s->no_route, s->redirected,
            s->resets, s->bad_acks, s->reused, s->synthetic, s->synthetic_failed, synthesize_pending(),
            s->longest_round * 1000000 / g_cycles_per_sec);
    s->longest_round = UINT64_MAX; /* this round does not count */
    ifa_json(out);
    fprintf(out, ",\"services\":");
    service_json(out);
    fprintf(out, "}");
    fclose(out);
    memcpy(*(char ***)(void *)msg->data, &text, sizeof(text));
    return EDPVS_OK;
}

/* On the master. */

static bool finished(struct dpvs_msg *msg)
{
    bool done;

    rte_spinlock_lock(&msg->lock);
    done = msg->flags & (DPVS_MSG_F_STATE_FIN | DPVS_MSG_F_STATE_DROP);
    rte_spinlock_unlock(&msg->lock);
    return done;
}

static int spread(const struct command *c)
{
    int err = apply(c);
    struct dpvs_msg *msg;

    if (err != EDPVS_OK)
        return err;
    for (unsigned cid = 0; cid < DPVS_MAX_LCORE; cid++) {
        int sent;

        if (!netif_lcore_is_fwd_worker((lcoreid_t)cid))
            continue;
        msg = msg_make(MSG_TYPE_TWIN_SET, 0, DPVS_MSG_UNICAST, (lcoreid_t)rte_lcore_id(), sizeof(*c), c);
        if (!msg)
            return EDPVS_NOMEM;
        sent = msg_send(msg, (lcoreid_t)cid, DPVS_MSG_F_ASYNC, NULL); /* no time-out: making ports takes its time */
        while (sent == EDPVS_OK && !finished(msg))
            usleep(50);
        if (sent != EDPVS_OK || (msg->flags & DPVS_MSG_F_CALLBACK_FAIL))
            err = sent != EDPVS_OK ? sent : EDPVS_MSG_FAIL;
        msg_destroy(&msg);
    }
    return err;
}

static void pool_json(struct rte_mempool *pool, void *arg)
{
    FILE *out = arg;

    if (strncmp(pool->name, "dp_vs_", 6) != 0 && strncmp(pool->name, "mbuf_pool", 9) != 0)
        return;
    fprintf(out, "%s\"%s\":{\"size\":%u,\"in_use\":%u,\"elt_size\":%u}", ftell(out) > 0 ? "," : "", pool->name,
            pool->size, rte_mempool_in_use_count(pool), pool->elt_size);
}

static int stats(FILE *out)
{
    const char *comma = "";
    char *pools = NULL;
    size_t len;
    FILE *memory;

    fprintf(out, "{\"ok\":true,\"pid\":%d,\"state\":%d,\"poll\":%s,\"master_ticks\":%lu,\"workers\":[", getpid(),
            dpvs_state_get(), twin_conf.poll ? "true" : "false", twin_ticks());
    for (unsigned cid = 0; cid < DPVS_MAX_LCORE; cid++) {
        char *text = NULL, **where = &text;
        struct dpvs_msg *msg;

        if (!netif_lcore_is_fwd_worker((lcoreid_t)cid))
            continue;
        msg = msg_make(MSG_TYPE_TWIN_STATS, 0, DPVS_MSG_UNICAST, (lcoreid_t)rte_lcore_id(), sizeof(where), &where);
        if (!msg)
            return EDPVS_NOMEM;
        if (msg_send(msg, (lcoreid_t)cid, DPVS_MSG_F_ASYNC, NULL) == EDPVS_OK)
            while (!finished(msg))
                usleep(50);
        msg_destroy(&msg);
        fprintf(out, "%s%s", comma, text ? text : "null");
        comma = ",";
        free(text);
    }
    memory = open_memstream(&pools, &len);
    if (!memory)
        return EDPVS_NOMEM;
    rte_mempool_walk(pool_json, memory);
    fclose(memory);
    fprintf(out, "],\"pools\":{%s}}", pools);
    free(pools);
    return EDPVS_OK;
}

/* Parsing: every function answers whether it understood. */

static bool parse_addr(const char *text, int *af, union inet_addr *addr)
{
    memset(addr, 0, sizeof(*addr));
    *af = strchr(text, ':') ? AF_INET6 : AF_INET;
    return inet_pton(*af, text, addr) == 1;
}

/* 10.0.0.1:80, [fd00::1]:80 */
static bool parse_addr_port(const char *text, int *af, union inet_addr *addr, uint16_t *port)
{
    char copy[64], *host = copy, *end;

    snprintf(copy, sizeof(copy), "%s", text);
    if (*copy == '[') {
        host = copy + 1;
        end = strstr(copy, "]:");
    } else {
        end = strchr(copy, ':');
    }
    if (!end)
        return false;
    *port = htons((uint16_t)atoi(end + (*end == ']' ? 2 : 1)));
    *end = '\0';
    return parse_addr(host, af, addr) && (*af == AF_INET6) == (host != copy);
}

static bool parse_prefix(const char *text, int *af, union inet_addr *addr, uint8_t *plen)
{
    char copy[64];
    char *slash;

    snprintf(copy, sizeof(copy), "%s", text);
    slash = strchr(copy, '/');
    *plen = 0;
    if (slash) {
        *slash = '\0';
        *plen = (uint8_t)atoi(slash + 1);
    }
    return parse_addr(copy, af, addr) && *plen <= (*af == AF_INET ? 32 : 128);
}

static bool parse_proto(const char *text, int *proto)
{
    *proto = !strcmp(text, "tcp") ? IPPROTO_TCP : !strcmp(text, "udp") ? IPPROTO_UDP : !strcmp(text, "sctp") ? IPPROTO_SCTP : 0;
    return *proto != 0;
}

static bool parse_mode(const char *text, enum dpvs_fwd_mode *mode)
{
    static const struct {
        const char *name;
        enum dpvs_fwd_mode mode;
    } modes[] = {{"fnat", DPVS_FWD_MODE_FNAT},
                 {"dr", DPVS_FWD_MODE_DR},
                 {"nat", DPVS_FWD_MODE_NAT},
                 {"tunnel", DPVS_FWD_MODE_TUNNEL},
                 {"snat", DPVS_FWD_MODE_SNAT}};

    for (size_t i = 0; i < RTE_DIM(modes); i++)
        if (!strcmp(text, modes[i].name)) {
            *mode = modes[i].mode;
            return true;
        }
    return false;
}

/* The value behind a word like "sched" or "weight", or `otherwise`. */
static const char *value_of(const char *name, char **words, int n, const char *otherwise)
{
    for (int i = 0; i + 1 < n; i++)
        if (!strcmp(words[i], name))
            return words[i + 1];
    return otherwise;
}

static bool has_word(const char *name, char **words, int n)
{
    for (int i = 0; i < n; i++)
        if (!strcmp(words[i], name))
            return true;
    return false;
}

static bool parse_pair(char **words, int n, struct command *c)
{
    static const struct {
        const char *noun, *verb;
        enum op op;
        int words;
    } verbs[] = {
        {"addr", "add", ADDR_ADD, 3},       {"addr", "del", ADDR_DEL, 3},   {"service", "add", SERVICE_ADD, 4},
        {"service", "del", SERVICE_DEL, 4}, {"dest", "add", DEST_ADD, 6},   {"dest", "edit", DEST_EDIT, 6},
        {"dest", "del", DEST_DEL, 5},       {"laddr", "add", LADDR_ADD, 5}, {"laddr", "del", LADDR_DEL, 5},
        {"service", "timeout", TIMEOUT, 5}, {"service", "persist", PERSIST, 5}, {"service", "synproxy", SYNPROXY, 5},
    };
    size_t i = 0;

    while (i < RTE_DIM(verbs) && (n < 2 || strcmp(words[0], verbs[i].noun) || strcmp(words[1], verbs[i].verb)))
        i++;
    if (i == RTE_DIM(verbs) || n < verbs[i].words)
        return false;
    c->op = verbs[i].op;
    if (c->op == ADDR_ADD || c->op == ADDR_DEL) {
        c->flags = has_word("sapool", words, n) ? IFA_F_SAPOOL : 0;
        if (!parse_prefix(words[2], &c->addr_af, &c->addr, &c->plen))
            return false;
        if (c->op == ADDR_ADD && c->plen == 0)
            c->plen = c->addr_af == AF_INET ? 32 : 128;
        return true;
    }
    if (!parse_proto(words[2], &c->proto) || !parse_addr_port(words[3], &c->af, &c->vip, &c->vport))
        return false;
    switch (c->op) {
    case SERVICE_ADD:
        snprintf(c->sched, sizeof(c->sched), "%s", value_of("sched", words, n, "rr"));
        return true;
    case SYNPROXY:
        c->number = !strcmp(words[4], "on");
        return c->number || !strcmp(words[4], "off");
    case TIMEOUT:
    case PERSIST:
        c->number = (uint32_t)strtoul(words[4], NULL, 10);
        return true;
    case DEST_ADD:
    case DEST_EDIT:
        c->dest.weight = atoi(value_of("weight", words, n, "1"));
        c->dest.max_conn = (uint32_t)strtoul(value_of("max_conn", words, n, "0"), NULL, 10);
        return parse_addr_port(words[4], &c->dest.af, &c->dest.addr, &c->dest.port) &&
               parse_mode(words[5], &c->dest.mode);
    case DEST_DEL:
        return parse_addr_port(words[4], &c->dest.af, &c->dest.addr, &c->dest.port);
    case LADDR_ADD:
    case LADDR_DEL:
        return parse_addr(words[4], &c->addr_af, &c->addr);
    default:
        return true;
    }
}

static bool parse_other(char **words, int n, struct command *c)
{
    if (!strcmp(words[0], "synthesize") && n == 4) {
        c->op = SYNTHESIZE;
        c->count = strtoull(words[1], NULL, 10);
        c->rate = strtoull(words[2], NULL, 10);
        c->number = (uint32_t)strtoul(words[3], NULL, 10);
        return c->count > 0;
    }
    if (!strcmp(words[0], "flush") && n == 1) {
        c->op = FLUSH;
        return true;
    }
    if (!strcmp(words[0], "seed") && n == 2) {
        c->op = SEED;
        c->number = (uint32_t)strtoul(words[1], NULL, 10);
        return true;
    }
    return false;
}

static int finish(FILE *out, int err)
{
    if (err == EDPVS_OK)
        fprintf(out, "{\"ok\":true}");
    else
        fprintf(out, "{\"ok\":false,\"errcode\":%d,\"error\":\"%s\"}", err, dpvs_strerror(err));
    return err;
}

static int run(char *line, FILE *out)
{
    char *words[MAX_WORDS], *save = NULL;
    struct command c;
    union inet_addr gw;
    int n = 0, af;

    memset(&c, 0, sizeof(c));
    for (char *w = strtok_r(line, " \t\r\n", &save); w && n < MAX_WORDS; w = strtok_r(NULL, " \t\r\n", &save))
        words[n++] = w;
    if (n == 0)
        return finish(out, EDPVS_INVAL);
    if (!strcmp(words[0], "stats"))
        return stats(out);
    if (!strcmp(words[0], "quit")) {
        dpvs_state_set(DPVS_STATE_FINISH);
        return finish(out, EDPVS_OK);
    }
    if (!strcmp(words[0], "poll") && n == 2) {
        twin_set_poll(!strcmp(words[1], "on"));
        return finish(out, EDPVS_OK);
    }
    if (!strcmp(words[0], "gateway") && n == 2 && parse_addr(words[1], &af, &gw) && af == AF_INET) {
        net_set_gateway(gw.in.s_addr);
        return finish(out, EDPVS_OK);
    }
    if (parse_pair(words, n, &c) || parse_other(words, n, &c))
        return finish(out, spread(&c));
    fprintf(out, "{\"ok\":false,\"errcode\":%d,\"error\":\"unknown command\"}", EDPVS_INVAL);
    return EDPVS_INVAL;
}

static bool read_line(int fd, char *line, size_t size)
{
    size_t used = 0;

    while (used < size - 1) {
        ssize_t got = read(fd, line + used, size - 1 - used);
        if (got <= 0)
            break;
        used += (size_t)got;
        if (memchr(line, '\n', used))
            break;
    }
    line[used] = '\0';
    return used > 0;
}

static void serve(int client)
{
    const struct timeval patience = {.tv_sec = 2};
    char line[512], *reply = NULL;
    size_t len;
    FILE *out;

    setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    setsockopt(client, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
    if (!read_line(client, line, sizeof(line)))
        return;
    out = open_memstream(&reply, &len);
    if (!out)
        return;
    run(line, out);
    fprintf(out, "\n");
    fclose(out);
    sendn(client, reply, len, MSG_NOSIGNAL);
    free(reply);
}

static void twinctl_job_func(void *dummy __rte_unused)
{
    int client = accept(server, NULL, NULL);

    if (client < 0)
        return;
    twin_worked();
    serve(client);
    close(client);
}

static struct dpvs_lcore_job job = {.name = "twinctl", .type = LCORE_JOB_LOOP, .func = twinctl_job_func};

/* Commands from a file, one a line, # for comments; stops at the first that fails. */
int twinctl_run_file(const char *path)
{
    FILE *file = fopen(path, "r");
    char line[512];
    int err = EDPVS_OK;

    if (!file)
        return EDPVS_SYSCALL;
    while (err == EDPVS_OK && fgets(line, sizeof(line), file)) {
        char copy[512], *reply = NULL;
        size_t len;
        FILE *out;

        line[strcspn(line, "#\n")] = '\0';
        if (line[strspn(line, " \t")] == '\0')
            continue;
        snprintf(copy, sizeof(copy), "%s", line);
        out = open_memstream(&reply, &len);
        if (!out)
            break;
        err = run(copy, out);
        fclose(out);
        if (err != EDPVS_OK)
            fprintf(stderr, "%s: %s: %s\n", path, line, reply);
        free(reply);
    }
    fclose(file);
    return err;
}

int twinctl_init(void)
{
    const struct dpvs_msg_type types[] = {{.type = MSG_TYPE_TWIN_SET, .unicast_msg_cb = on_set},
                                          {.type = MSG_TYPE_TWIN_STATS, .unicast_msg_cb = on_stats}};
    struct sockaddr_un addr = {.sun_family = AF_UNIX};

    for (unsigned cid = 0; cid < DPVS_MAX_LCORE; cid++)
        for (size_t i = 0; i < RTE_DIM(types); i++) {
            struct dpvs_msg_type mt = types[i];

            if (!netif_lcore_is_fwd_worker((lcoreid_t)cid))
                continue;
            mt.mode = DPVS_MSG_UNICAST;
            mt.prio = MSG_PRIO_NORM;
            mt.cid = (lcoreid_t)cid;
            if (msg_type_register(&mt) != EDPVS_OK)
                return EDPVS_NOMEM;
        }
    server = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (server < 0 ||
        snprintf(addr.sun_path, sizeof(addr.sun_path), "%s.twin", dpvs_ipc_file) >= (int)sizeof(addr.sun_path))
        return EDPVS_IO;
    unlink(addr.sun_path);
    if (bind(server, (struct sockaddr *)&addr, sizeof(addr)) < 0 || listen(server, 8) < 0)
        return EDPVS_IO;
    return dpvs_lcore_job_register(&job, LCORE_ROLE_MASTER);
}

void twinctl_term(void)
{
    char path[300];

    close(server);
    snprintf(path, sizeof(path), "%s.twin", dpvs_ipc_file);
    unlink(path);
}
