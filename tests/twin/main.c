/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The twin of DPVS 1.10.2: dpvs-twin [-c CONF] [-p PIDFILE] [-x IPC] -- EAL-OPTIONS...
 * Environment: TWIN_COMMANDS=file of commands to run at the start, TWIN_POLL=1 never sleep.
 */
#include <dirent.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/time.h>
#include <unistd.h>

#include <rte_eal.h>
#include <rte_timer.h>

#include "twin.h"

#ifdef __SANITIZE_ADDRESS__
const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
    return "detect_leaks=0:abort_on_error=1";
}
#endif

static volatile sig_atomic_t reload;

static void on_sighup(int sig __rte_unused)
{
    reload = 1;
}

/* Of the signals DPVS handles only SIGHUP (src/cfgfile.c): the others do what they do to any process. */
static void reload_job_func(void *dummy __rte_unused)
{
    if (!reload)
        return;
    reload = 0;
    LOG(INFO, "Got signal SIGHUP.\n");
    conf_load(dpvs_conf_file, false);
}

static void timer_job_func(void *dummy __rte_unused)
{
    static RTE_DEFINE_PER_LCORE(uint64_t, last);
    uint64_t now = rte_get_timer_cycles();

    if ((now - RTE_PER_LCORE(last)) * 1000000 / g_cycles_per_sec > (uint64_t)twin_conf.schedule_interval_us) {
        rte_timer_manage();
        RTE_PER_LCORE(last) = now;
    }
}

static struct dpvs_lcore_job reload_job = {.name = "cfgfile_reload", .type = LCORE_JOB_LOOP, .func = reload_job_func};
static struct dpvs_lcore_job master_timer = {.name = "timer_manage", .type = LCORE_JOB_LOOP, .func = timer_job_func};
static struct dpvs_lcore_job worker_timer = {.name = "timer_manage", .type = LCORE_JOB_LOOP, .func = timer_job_func};

static void usage(const char *name)
{
    fprintf(stderr, "usage: %s [-c CONF] [-p PIDFILE] [-x IPC] -- EAL-OPTIONS...\n", name);
    exit(EXIT_FAILURE);
}

static int parse_args(int argc, char **argv)
{
    static const struct option options[] = {{"conf", required_argument, NULL, 'c'},
                                            {"pid-file", required_argument, NULL, 'p'},
                                            {"ipc-file", required_argument, NULL, 'x'},
                                            {NULL, 0, NULL, 0}};
    char *name = argv[0];
    int c, used;

    dpvs_conf_file = "/etc/dpvs.conf";
    dpvs_pid_file = "/var/run/dpvs.pid";
    dpvs_ipc_file = "/var/run/dpvs.ipc";
    while ((c = getopt_long(argc, argv, "c:p:x:", options, NULL)) != -1) {
        if (c == 'c')
            dpvs_conf_file = optarg;
        else if (c == 'p')
            dpvs_pid_file = optarg;
        else if (c == 'x')
            dpvs_ipc_file = optarg;
        else
            usage(name);
    }
    used = optind - 1;
    argv[used] = name;
    optind = 1;
    return used;
}

static bool running(const char *path)
{
    FILE *file = fopen(path, "r");
    int pid = 0;

    if (!file)
        return false;
    if (fscanf(file, "%d", &pid) != 1)
        pid = 0;
    fclose(file);
    return pid > 0 && kill(pid, 0) == 0;
}

/* Threads carry the names of DPDK 24.11, which the real DPVS 1.10.2 uses. */
static void rename_control_threads(void)
{
    DIR *tasks = opendir("/proc/self/task");
    struct dirent *task;

    while (tasks && (task = readdir(tasks))) {
        char path[300], comm[32] = "";
        const char *name = NULL;
        int fd;

        snprintf(path, sizeof(path), "/proc/self/task/%s/comm", task->d_name);
        fd = open(path, O_RDWR | O_CLOEXEC);
        if (fd < 0)
            continue;
        if (read(fd, comm, sizeof(comm) - 1) > 0) {
            if (!strncmp(comm, "eal-intr", 8))
                name = "dpdk-intr";
            else if (!strncmp(comm, "rte_mp", 6))
                name = "dpdk-mp-msg";
        }
        if (name && write(fd, name, strlen(name)) < 0)
            LOG(WARNING, "cannot name thread %s: %m\n", task->d_name);
        close(fd);
    }
    if (tasks)
        closedir(tasks);
}

static int name_worker(void *dummy __rte_unused)
{
    char name[16];

    snprintf(name, sizeof(name), "dpdk-worker%u", rte_lcore_id());
    prctl(PR_SET_TIMERSLACK, 1000UL);
    return pthread_setname_np(pthread_self(), name);
}

static void assign_roles(void)
{
    for (int i = 0; i < DPVS_MAX_LCORE; i++)
        g_lcore_index2id[i] = g_lcore_id2index[i] = -1;
    g_master_lcore_id = (lcoreid_t)rte_get_main_lcore();
    g_lcore_role[g_master_lcore_id] = LCORE_ROLE_MASTER;
    g_lcore_index2id[0] = g_master_lcore_id;
    g_lcore_id2index[g_master_lcore_id] = 0;
    g_lcore_num = 1;
    for (int i = 0; i < twin_conf.nworkers; i++) {
        lcoreid_t cid = twin_conf.workers[i].cid;

        if (!twin_conf.workers[i].slave)
            continue;
        if (cid >= DPVS_MAX_LCORE || !rte_lcore_is_enabled(cid) || g_lcore_role[cid] != LCORE_ROLE_IDLE)
            rte_exit(EXIT_FAILURE, "worker cpu_id %u is not an lcore of its own\n", cid);
        g_lcore_role[cid] = LCORE_ROLE_FWD_WORKER;
        g_lcore_index2id[g_lcore_num] = cid;
        g_lcore_id2index[cid] = g_lcore_num++;
        g_slave_lcore_mask |= UINT64_C(1) << cid;
        g_slave_lcore_num++;
    }
    if (g_slave_lcore_num == 0)
        rte_exit(EXIT_FAILURE, "%s has no worker of type slave\n", dpvs_conf_file);
}

static void seed_random(void)
{
    struct timeval tv;
    long seed;

    gettimeofday(&tv, NULL);
    seed = tv.tv_sec ^ tv.tv_usec ^ getpid();
    srandom((unsigned)seed);
    srand48(seed);
    rte_srand((uint64_t)seed);
}

static void open_log(void)
{
    FILE *log = twin_conf.log_file[0] ? fopen(twin_conf.log_file, "a") : NULL;

    if (!log)
        return;
    setvbuf(log, NULL, _IOLBF, 0);
    rte_openlog_stream(log);
}

static void init_modules(void)
{
    static const struct {
        const char *name;
        int (*init)(void);
    } modules[] = {
        {"timer", dpvs_timer_init},
        {"netif", net_init},
        {"msg", msg_init},
        {"sockopt", sockopt_init},
        {"inetaddr", inetaddr_init},
        {"sa_pool", sa_pool_init},
        {"proto", dp_vs_proto_init},
        {"conn", dp_vs_conn_init},
        {"redirect", dp_vs_redirects_init},
        {"service", service_init},
        {"eal_mem", eal_mem_sockopt_init},
        {"synthesize", synthesize_init},
        {"twinctl", twinctl_init},
        {"start of the port", net_start},
    };

    for (size_t i = 0; i < RTE_DIM(modules); i++) {
        int err = modules[i].init();
        if (err != EDPVS_OK)
            rte_exit(EXIT_FAILURE, "failed to init %s: %s\n", modules[i].name, dpvs_strerror(err));
    }
    dpvs_lcore_job_register(&master_timer, LCORE_ROLE_MASTER);
    dpvs_lcore_job_register(&worker_timer, LCORE_ROLE_FWD_WORKER);
    dpvs_lcore_job_register(&reload_job, LCORE_ROLE_MASTER);
}

/* A process of two cores' worth of affinity may have started us: EAL sets each lcore's own. */
static void widen_affinity(void)
{
    cpu_set_t cpus;

    CPU_ZERO(&cpus);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        CPU_SET(cpu, &cpus);
    pthread_setaffinity_np(pthread_self(), sizeof(cpus), &cpus);
}

static int init_eal(int argc, char **argv)
{
#ifdef __SANITIZE_ADDRESS__
    char *with_base[argc + 2]; /* DPDK's own choice of address is in the sanitizer's shadow */
    int n = 0;

    with_base[n++] = argv[0];
    with_base[n++] = "--base-virtaddr=0x200000000000";
    for (int i = 1; i < argc; i++)
        with_base[n++] = argv[i];
    return rte_eal_init(n, with_base);
#else
    return rte_eal_init(argc, argv);
#endif
}

int main(int argc, char **argv)
{
    struct sigaction hup = {.sa_handler = on_sighup};
    const char *commands = getenv("TWIN_COMMANDS"), *poll = getenv("TWIN_POLL");
    int used = parse_args(argc, argv);
    unsigned lcore;
    FILE *pidfile;

    prctl(PR_SET_NAME, "dpvs");
    prctl(PR_SET_TIMERSLACK, 1000UL);
    if (running(dpvs_pid_file)) {
        fprintf(stderr, "dpvs is already running\n");
        return EXIT_FAILURE;
    }
    dpvs_state_set(DPVS_STATE_INIT);
    seed_random();
    widen_affinity();
    if (conf_load(dpvs_conf_file, true) != EDPVS_OK)
        return EXIT_FAILURE;
    twin_conf.poll = poll && !strcmp(poll, "1");
    open_log();
    if (init_eal(argc - used, argv + used) < 0)
        rte_exit(EXIT_FAILURE, "Invalid EAL parameters\n");
    g_cycles_per_sec = rte_get_timer_hz();
    rename_control_threads();
    rte_eal_mp_remote_launch(name_worker, NULL, SKIP_MAIN);
    rte_eal_mp_wait_lcore();
    assign_roles();
    sigaction(SIGHUP, &hup, NULL);

    scheduler_init();
    init_modules();
    dpvs_lcore_start(0);
    if (commands && twinctl_run_file(commands) != EDPVS_OK)
        rte_exit(EXIT_FAILURE, "TWIN_COMMANDS=%s failed\n", commands);
    pidfile = fopen(dpvs_pid_file, "w");
    if (!pidfile)
        rte_exit(EXIT_FAILURE, "cannot write %s: %m\n", dpvs_pid_file);
    fprintf(pidfile, "%d\n", getpid());
    fclose(pidfile);
    dpvs_state_set(DPVS_STATE_NORMAL);
    dpvs_lcore_start(1);

    /* only the command "quit" gets here */
    RTE_LCORE_FOREACH_WORKER (lcore)
        rte_eal_wait_lcore(lcore);
    net_stop();
    twinctl_term();
    sockopt_term();
    unlink(dpvs_pid_file);
    rte_eal_cleanup();
    return EXIT_SUCCESS;
}
