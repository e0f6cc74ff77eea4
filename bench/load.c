/* The client: asks as fast as it is told to and checks every reply. One thread, epoll.

       load --port PORT --request FILE [--connections N] [--mode replies|streams|hold] [--seconds S] [--warm-up S]
            [--requests N] [--expect FILE] [--needle TEXT] [--events N] [--exact] [--pids PID,PID]

   FILE holds the bytes of one request, head and body. Prints one JSON object. Anything but status 200, the bytes
   of --expect, TEXT within the body, or N events and [DONE] ends it with exit code 1 and a sentence: a fast error
   is not speed. With --exact there may be no event but the engine's. --pids are processes whose CPU time is counted.

   replies  every connection asks again once its reply is whole; what ends within the seconds after the warm-up counts,
            or the first so many requests
   streams  all connections are opened and ask at once, once; events count for so many seconds from when all streams
            have begun; then every stream is waited for
   hold     opens and asks like streams, says so in a line, and holds the streams until its standard input ends */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { READ = 1 << 18, KEPT = 1 << 16, PIDS = 64 };
static const uint64_t BEGIN_LIMIT_NS = 30000000000ull, END_LIMIT_NS = 15000000000ull;
enum parse { IN_HEAD, IN_BODY, IN_CHUNK_SIZE, IN_CHUNK, IN_CHUNK_END, IN_TRAILER };

struct connection {
    int fd, is_connecting, has_begun, is_over, is_chunked, is_done, wants_out, closes, status;
    enum parse state;
    size_t sent;
    uint64_t asked_ns, left, size;
    long long events;
    char *kept;               /* the head, a line of framing, the start of the body, or the rest of an event */
    size_t kept_size;
    char line[64];
    size_t line_size;
};

struct numbers { uint64_t *all; size_t count, room; };

static char *request, *expected, *needle;
static size_t request_size, expected_size;
static long long wanted_events = -1, wanted_requests = -1;
static int is_exact, poll_fd, port, pid_count, begun, over;
static clockid_t clocks[PIDS];
static struct connection *all;
static struct numbers latency, first, transit;
static long long requests, events, other_events, reads, asked;
static int is_open, stops, asks_again;

static void fail(const char *form, ...) {
    va_list arguments;
    va_start(arguments, form);
    vfprintf(stderr, form, arguments);
    fputc('\n', stderr);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static double cpu_s(void) {
    double sum = 0;
    for (int i = 0; i < pid_count; i++) {
        struct timespec t;
        if (clock_gettime(clocks[i], &t)) fail("a process whose CPU time is counted has ended");
        sum += t.tv_sec + t.tv_nsec / 1e9;
    }
    return sum;
}

static void note(struct numbers *n, uint64_t value) {
    if (n->count == n->room) n->all = realloc(n->all, (n->room = 2 * n->room + 4096) * sizeof *n->all);
    n->all[n->count++] = value;
}

static int by_size(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void print_quantiles(const char *name, struct numbers *n) {
    if (!n->count) { printf("\"%s\":null,", name); return; }
    qsort(n->all, n->count, sizeof *n->all, by_size);
    printf("\"%s\":{\"p50\":%.6f,\"p99\":%.6f},", name, n->all[n->count / 2] / 1e6, n->all[n->count * 99 / 100] / 1e6);
}

static char *content_of(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    struct stat about;
    if (!file || fstat(fileno(file), &about)) fail("%s: %s", path, strerror(errno));
    char *text = malloc(about.st_size + 1);
    *size = fread(text, 1, about.st_size, file);
    text[*size] = 0;
    fclose(file);
    return text;
}

/* Asking */

static void watch(struct connection *c, int wants_out) {
    if (c->wants_out == wants_out) return;
    c->wants_out = wants_out;
    struct epoll_event e = {.events = EPOLLIN | (wants_out ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(poll_fd, EPOLL_CTL_MOD, c->fd, &e);
}

static void send_rest(struct connection *c) {
    while (c->sent < request_size) {
        ssize_t n = send(c->fd, request + c->sent, request_size - c->sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) { watch(c, 1); return; }
        if (n < 0) return; /* what the other side has said before it closed is still to be read */
        c->sent += n;
    }
    watch(c, 0);
}

static void ask(struct connection *c) {
    if (wanted_requests >= 0 && asked >= wanted_requests) return;
    asked++;
    c->state = IN_HEAD;
    c->kept_size = c->line_size = c->sent = 0;
    c->size = c->left = c->events = 0;
    c->is_done = c->has_begun = c->status = 0;
    c->is_over = 0;
    send_rest(c);
}

static void open_one(struct connection *c) {
    int one = 1;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) fail("no socket: %s", strerror(errno));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    c->kept = malloc(KEPT + 1);
    c->is_connecting = c->wants_out = 1;
    c->asked_ns = now_ns(); /* of the first request: connecting is part of it */
    if (connect(c->fd, (void *)&at, sizeof at) && errno != EINPROGRESS) fail("cannot connect: %s", strerror(errno));
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, c->fd, &e);
}

/* Checking */

static void see_event(struct connection *c, const char *event, size_t size) {
    static const char token[] = "\"content\":\"tok ";
    if (size && event[0] == ':') return; /* a comment, which a gateway may send while one waits */
    if (size >= 12 && !memcmp(event, "data: [DONE]", 12)) { c->is_done = 1; return; }
    const char *found = memmem(event, size, token, sizeof token - 1);
    if (!found) {
        if (is_exact) fail("not an event of the engine's: %.*s", (int)size, event);
        other_events++;
        return;
    }
    c->events++;
    events++;
    if (is_open) note(&transit, now_ns() - strtoull(found + sizeof token - 1, NULL, 10));
}

static void keep(struct connection *c, const char *data, size_t size) {
    if (c->kept_size + size > KEPT) fail("more than %d bytes without an end: %.200s", KEPT, c->kept);
    memcpy(c->kept + c->kept_size, data, size);
    c->kept_size += size;
    c->kept[c->kept_size] = 0;
}

static void take_body(struct connection *c, const char *data, size_t size) {
    if (!c->has_begun) {
        c->has_begun = 1;
        begun++;
        if (is_open || !asks_again) note(&first, now_ns() - c->asked_ns);
    }
    if (expected && c->status == 200) {
        if (c->size + size > expected_size || memcmp(expected + c->size, data, size))
            fail("the body is not what the engine sent, from byte %llu on: %.*s", (unsigned long long)c->size,
                 (int)(size < 300 ? size : 300), data);
    } else if (wanted_events >= 0 && c->status == 200) {
        while (size) { /* what is kept never holds a whole event */
            size_t room = KEPT - c->kept_size, n = size < room ? size : room;
            if (!n) fail("an event of more than %d bytes", KEPT);
            keep(c, data, n);
            data += n;
            size -= n;
            c->size += n;
            char *from = c->kept, *to = c->kept + c->kept_size, *end;
            while ((end = memmem(from, to - from, "\n\n", 2))) {
                see_event(c, from, end - from);
                from = end + 2;
            }
            c->kept_size = to - from;
            memmove(c->kept, from, c->kept_size);
        }
        return;
    } else if (c->kept_size < KEPT) {
        size_t room = KEPT - c->kept_size;
        keep(c, data, size < room ? size : room);
    }
    c->size += size;
}

static void end_reply(struct connection *c) {
    c->kept[c->kept_size] = 0;
    if (c->status != 200) fail("status %d: %.500s", c->status, c->kept);
    if (expected && c->size != expected_size) fail("%llu bytes, not %zu", (unsigned long long)c->size, expected_size);
    if (wanted_events >= 0 && (c->events != wanted_events || !c->is_done || c->kept_size))
        fail("%lld events of %lld, [DONE]: %d, %zu bytes after the last", c->events, wanted_events, c->is_done, c->kept_size);
    if (needle && wanted_events < 0 && !expected && !memmem(c->kept, c->kept_size, needle, strlen(needle)))
        fail("without %s: %.500s", needle, c->kept);
    if (c->sent < request_size) fail("the reply came before the request was sent");
    uint64_t now = now_ns();
    c->is_over = 1;
    over++;
    if (is_open || !asks_again) {
        requests++;
        note(&latency, now - c->asked_ns);
    }
    if (stops || !asks_again) return;
    if (c->closes) fail("the reply ends the connection");
    c->asked_ns = now;
    ask(c);
}

static void read_head(struct connection *c) {
    char *save, *line = strtok_r(c->kept, "\r\n", &save);
    c->is_chunked = c->closes = 0;
    uint64_t length = UINT64_MAX;
    if (!line || sscanf(line, "HTTP/1.1 %d", &c->status) != 1) fail("not HTTP/1.1: %.200s", line ? line : "");
    while ((line = strtok_r(NULL, "\r\n", &save))) {
        if (!strncasecmp(line, "content-length:", 15)) length = strtoull(line + 15, NULL, 10);
        else if (!strncasecmp(line, "transfer-encoding:", 18) && strcasestr(line, "chunked")) c->is_chunked = 1;
        else if (!strncasecmp(line, "connection:", 11) && strcasestr(line, "close")) c->closes = 1;
    }
    if (!c->is_chunked && length == UINT64_MAX) fail("a reply without a length");
    c->kept_size = 0;
    c->left = c->is_chunked ? 0 : length;
    c->state = c->is_chunked ? IN_CHUNK_SIZE : IN_BODY;
}

static int until_line(struct connection *c, const char **data, size_t *size) {
    while (*size) {
        char byte = *(*data)++;
        --*size;
        if (c->line_size + 1 >= sizeof c->line) fail("a line of chunked framing that does not end");
        c->line[c->line_size++] = byte;
        if (byte == '\n') { c->line[c->line_size] = 0; return 1; }
    }
    return 0;
}

static void take(struct connection *c, const char *data, size_t size) {
    size_t n;
    while (size || (c->state == IN_BODY && !c->left)) {
        if (c->is_over) fail("%zu bytes after the reply", size);
        switch (c->state) {
        case IN_HEAD: {
            size_t old = c->kept_size, from = old > 3 ? old - 3 : 0, part = size < KEPT - old ? size : KEPT - old;
            keep(c, data, part);
            char *end = memmem(c->kept + from, c->kept_size - from, "\r\n\r\n", 4);
            if (!end) { data += part; size -= part; break; }
            n = end + 4 - c->kept - old;
            data += n;
            size -= n;
            end[2] = 0;
            read_head(c);
            break;
        }
        case IN_BODY:
        case IN_CHUNK:
            n = size < c->left ? size : c->left;
            if (n) take_body(c, data, n);
            data += n;
            size -= n;
            if ((c->left -= n)) return;
            if (c->state == IN_CHUNK) { c->state = IN_CHUNK_END; break; }
            if (size) fail("%zu bytes after the reply", size);
            end_reply(c);
            return;
        case IN_CHUNK_SIZE:
            if (!until_line(c, &data, &size)) return;
            c->left = strtoull(c->line, NULL, 16);
            c->line_size = 0;
            c->state = c->left ? IN_CHUNK : IN_TRAILER;
            break;
        case IN_CHUNK_END:
        case IN_TRAILER:
            if (!until_line(c, &data, &size)) return;
            n = c->line_size;
            c->line_size = 0;
            if (c->state == IN_CHUNK_END) c->state = IN_CHUNK_SIZE;
            else if (n == 2) {
                if (size) fail("%zu bytes after the reply", size);
                end_reply(c);
                return;
            }
            break;
        }
    }
}

static void look(struct connection *c, uint32_t found) {
    static char data[READ];
    if (found & EPOLLOUT) {
        if (c->is_connecting) {
            int error = 0;
            socklen_t size = sizeof error;
            getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
            if (error) fail("cannot connect: %s", strerror(error));
            c->is_connecting = 0;
            ask(c);
        } else send_rest(c);
    }
    if (!(found & (EPOLLIN | EPOLLHUP | EPOLLERR))) return;
    ssize_t n = recv(c->fd, data, sizeof data, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        if (c->is_over && (!asks_again || stops)) { close(c->fd); return; }
        fail("the connection was closed (%s)", n ? strerror(errno) : "cleanly");
    }
    reads++;
    take(c, data, n);
}

static void turn(uint64_t until) {
    struct epoll_event found[512];
    uint64_t now = now_ns(), wait = until > now ? until - now : 0;
    struct timespec limit = {wait / 1000000000, wait % 1000000000};
    int n = epoll_pwait2(poll_fd, found, 512, &limit, NULL);
    if (n < 0 && errno != EINTR) fail("epoll_pwait2: %s", strerror(errno));
    for (int i = 0; i < n; i++) {
        if (found[i].data.ptr) look(found[i].data.ptr, found[i].events);
        else stops = 1; /* standard input has ended */
    }
}

static void run_until(uint64_t limit) { while (now_ns() < limit) turn(limit); }

int main(int count, char **words) {
    const char *mode = "replies";
    int connections = 1;
    double seconds = 2, warm_up_s = 0.3;
    for (int i = 1; i < count; i++) {
        char *value = i + 1 < count ? words[i + 1] : "";
        if (!strcmp(words[i], "--exact")) { is_exact = 1; continue; }
        if (!strcmp(words[i], "--port")) port = atoi(value);
        else if (!strcmp(words[i], "--request")) request = content_of(value, &request_size);
        else if (!strcmp(words[i], "--connections")) connections = atoi(value);
        else if (!strcmp(words[i], "--mode")) mode = value;
        else if (!strcmp(words[i], "--seconds")) seconds = atof(value);
        else if (!strcmp(words[i], "--warm-up")) warm_up_s = atof(value);
        else if (!strcmp(words[i], "--requests")) wanted_requests = atoll(value);
        else if (!strcmp(words[i], "--expect")) expected = content_of(value, &expected_size);
        else if (!strcmp(words[i], "--needle")) needle = value;
        else if (!strcmp(words[i], "--events")) wanted_events = atoll(value);
        else if (!strcmp(words[i], "--pids")) {
            for (char *save, *pid = strtok_r(value, ",", &save); pid && pid_count < PIDS; pid = strtok_r(NULL, ",", &save))
                if (clock_getcpuclockid(atoi(pid), &clocks[pid_count++])) fail("there is no process %s", pid);
        } else fail("there is no flag %s", words[i]);
        i++;
    }
    if (!port || !request) fail("--port and --request have to be given");
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    poll_fd = epoll_create1(EPOLL_CLOEXEC);
    asks_again = !strcmp(mode, "replies");
    all = calloc(connections, sizeof *all);
    uint64_t start = now_ns(), opened, closed;
    long long events_before, reads_before;
    double cpu;
    for (int i = 0; i < connections; i++) open_one(&all[i]);

    if (wanted_requests >= 0) {
        is_open = 1;
        opened = start;
        cpu = cpu_s();
        events_before = reads_before = 0;
        uint64_t limit = opened + BEGIN_LIMIT_NS + END_LIMIT_NS;
        while (requests < wanted_requests && now_ns() < limit) turn(limit);
        if (requests < wanted_requests) fail("%lld of %lld replies came in time", requests, wanted_requests);
    } else {
        if (asks_again) run_until(start + warm_up_s * 1e9);
        else {
            uint64_t limit = start + BEGIN_LIMIT_NS;
            while (begun < connections && now_ns() < limit) turn(limit);
            if (begun < connections && strcmp(mode, "streams")) fail("%d of %d streams began in time", begun, connections);
            run_until(now_ns() + warm_up_s * 1e9);
        }
        if (!strcmp(mode, "hold")) {
            struct epoll_event e = {.events = EPOLLIN};
            if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, 0, &e)) fail("standard input cannot be waited for");
            printf("held\n");
            fflush(stdout);
            while (!stops) turn(now_ns() + 1000000000);
            return 0;
        }
        is_open = 1;
        opened = now_ns();
        cpu = cpu_s();
        events_before = events;
        reads_before = reads;
        run_until(opened + seconds * 1e9);
    }
    closed = now_ns();
    cpu = cpu_s() - cpu;
    is_open = 0;
    stops = 1;
    long long counted_events = events - events_before, counted_reads = reads - reads_before;
    if (!asks_again) {
        uint64_t limit = closed + END_LIMIT_NS;
        while (over < connections && now_ns() < limit) turn(limit);
    } else if (!requests) fail("no reply was whole in time");
    printf("{\"requests\":%lld,\"events\":%lld,\"other_events\":%lld,\"reads\":%lld,\"begun\":%d,\"over\":%d,\"seconds\":%.6f,",
           requests, counted_events, other_events, counted_reads, begun, over, (closed - opened) / 1e9);
    print_quantiles("latency_ms", &latency);
    print_quantiles("first_ms", &first);
    print_quantiles("transit_ms", &transit);
    printf("\"cpu_s\":%.9f}\n", cpu);
    return 0;
}
