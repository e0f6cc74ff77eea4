/* A stand-in for an inference engine that is far faster than anything in front of it. One thread, epoll.

       mock_engine [--tcp PORT] [--unix PATH] [--lifetime SECONDS]

   Port 0 is any free one; where it listens is said on standard error. With API_KEY in the environment, POST
   needs that key as bearer. Every reply is built beforehand. What a request wants stands in its text, where
   every gateway leaves it alone: `[[events=50 pace_us=20000 reply_bytes=480]]`; `"stream":true` is OpenAI's.

   POST /v1/chat/completions  one reply of exactly so many bytes, or so many events at that pace, then [DONE].
                              An event carries the time of its sending (CLOCK_MONOTONIC, ns).
                              A text "data:...;base64,<digits>" is an upload: its digits have to count up.
   POST /v1/embeddings        vectors, in exactly so many bytes
   GET  /stats                what has been counted: connections, requests, reads, streams broken off
   GET  anything else         200 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_LIMIT = 65536, OPENING = 16384, READ = 1 << 18, BACKLOG = 4096, SIZES = 64, DIGITS = 8 };
enum parse { IN_HEAD, IN_BODY, IN_CHUNK_SIZE, IN_CHUNK, IN_CHUNK_END, IN_TRAILER };

struct connection {
    int fd, listens, heap_at;     /* heap_at: 1 + place among the timers; 0 for none */
    enum parse state;
    char *head;                   /* what of a head, or of a line of chunked framing, has come so far */
    size_t head_size;
    char method[8], path[128];
    int is_chunked, may_enter;
    uint64_t left;                /* of the body, or of its chunk */
    char opening[OPENING + 1];    /* of the body */
    size_t opening_size;
    uint64_t body_size, upload_size;
    int in_upload, upload_is_right;
    const char *reply;            /* of which this much is still to be written; shared */
    size_t reply_left;
    char *late;                   /* parts of a stream that the socket did not take */
    size_t late_size, late_room;
    int events, events_left, wants_usage, is_answering, wants_out;
    uint64_t due_ns, pace_ns;
};

static struct { unsigned long long accepted, open, requests, reads, broken_off; } counted;
static int poll_fd;
static char bearer[512];
static struct connection **timers;
static int timer_count, timer_room;

static void die(const char *what) { fprintf(stderr, "mock_engine: %s: %s\n", what, strerror(errno)); exit(1); }

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* Timers: a heap by `due_ns`. */

static void put(int i, struct connection *c) { timers[i] = c; c->heap_at = i + 1; }

static void sift(int i) {
    struct connection *c = timers[i];
    for (; i && timers[(i - 1) / 2]->due_ns > c->due_ns; i = (i - 1) / 2) put(i, timers[(i - 1) / 2]);
    for (int child; (child = 2 * i + 1) < timer_count; i = child) {
        if (child + 1 < timer_count && timers[child + 1]->due_ns < timers[child]->due_ns) child++;
        if (timers[child]->due_ns >= c->due_ns) break;
        put(i, timers[child]);
    }
    put(i, c);
}

static void set_timer(struct connection *c) {
    if (!c->heap_at) {
        if (timer_count == timer_room) timers = realloc(timers, (timer_room = 2 * timer_room + 64) * sizeof *timers);
        put(timer_count++, c);
    }
    sift(c->heap_at - 1);
}

static void drop_timer(struct connection *c) {
    if (!c->heap_at) return;
    int i = c->heap_at - 1;
    struct connection *last = timers[--timer_count];
    c->heap_at = 0;
    if (last != c) { put(i, last); sift(i); }
}

/* Replies, built once for each size. */

struct built { int is_vectors; size_t size, whole; char *text; };

static const struct built *reply_of(int is_vectors, size_t size) {
    static struct built all[SIZES];
    static int count;
    for (int i = 0; i < count; i++)
        if (all[i].size == size && all[i].is_vectors == is_vectors) return &all[i];
    const char *start = is_vectors
        ? "{\"object\":\"list\",\"model\":\"mock\",\"data\":[{\"object\":\"embedding\",\"index\":0,\"embedding\":[0.5"
        : "{\"id\":\"chatcmpl-0\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"mock\",\"choices\":"
          "[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"";
    const char *end = is_vectors
        ? "]}],\"usage\":{\"prompt_tokens\":64,\"total_tokens\":64}}"
        : "\"},\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":64,\"completion_tokens\":64,\"total_tokens\":128}}";
    size_t least = strlen(start) + strlen(end);
    if (size < least) size = least;
    char *text = malloc(size + 512);
    char *at = text + sprintf(text, "HTTP/1.1 200 OK\r\nServer: mock\r\nContent-Type: application/json\r\n"
                                    "Content-Length: %zu\r\n\r\n%s", size, start);
    size_t fill = size - least;
    if (is_vectors)
        for (unsigned n = 1; fill >= 11; fill -= 11, n = n * 1103515245u + 12345u)
            at += sprintf(at, ",0.%08u", n % 90000000u + 10000000u);
    memset(at, is_vectors ? ' ' : 'a', fill);
    at += fill;
    at += sprintf(at, "%s", end);
    struct built *made = count < SIZES ? &all[count++] : &all[SIZES - 1];
    *made = (struct built){is_vectors, size, at - text, text};
    return made;
}

/* The digits of an upload: 00000000 00000001 00000002 ... */

static int counts_up(const char *data, size_t size, uint64_t from) {
    static char *digits;
    static const size_t all = 1 << 25;
    if (!digits) {
        digits = malloc(all + 16);
        for (size_t n = 0; n < all / DIGITS; n++) sprintf(digits + n * DIGITS, "%08zu", n);
    }
    return from + size <= all && !memcmp(data, digits + from, size);
}

/* Writing */

static void watch(struct connection *c, int wants_out) {
    if (c->wants_out == wants_out) return;
    c->wants_out = wants_out;
    struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP | (wants_out ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(poll_fd, EPOLL_CTL_MOD, c->fd, &e);
}

static void leave(struct connection *c) {
    if (c->fd < 0) return;
    if (c->is_answering) counted.broken_off++;
    counted.open--;
    drop_timer(c);
    close(c->fd);
    c->fd = -1; /* freed once this round of events is over */
}

static void write_part(struct connection *c, const char *data, size_t size) {
    ssize_t n = 0;
    if (!c->late_size) {
        n = send(c->fd, data, size, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN) { leave(c); return; }
        if (n < 0) n = 0;
    }
    if ((size_t)n == size) return;
    size -= n;
    if (c->late_size + size > c->late_room)
        c->late = realloc(c->late, c->late_room = 2 * (c->late_size + size));
    memcpy(c->late + c->late_size, data + n, size);
    c->late_size += size;
    watch(c, 1);
}

static void flush(struct connection *c) {
    while (c->late_size || c->reply_left) {
        const char *from = c->late_size ? c->late : c->reply;
        size_t size = c->late_size ? c->late_size : c->reply_left;
        ssize_t n = send(c->fd, from, size, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) { watch(c, 1); return; }
        if (n < 0) { leave(c); return; }
        if (c->late_size) { memmove(c->late, c->late + n, size - n); c->late_size -= n; }
        else { c->reply += n; c->reply_left -= n; if (!c->reply_left) c->is_answering = 0; }
    }
    watch(c, 0);
}

static void say(struct connection *c, const char *status, const char *body) {
    char text[1024];
    int n = snprintf(text, sizeof text, "HTTP/1.1 %s\r\nServer: mock\r\nContent-Type: application/json\r\n"
                     "Content-Length: %zu\r\n\r\n%s", status, strlen(body), strcmp(c->method, "HEAD") ? body : "");
    write_part(c, text, n);
}

static int chunk(char *at, const char *data, int size) { return sprintf(at, "%x\r\n%.*s\r\n", size, size, data); }

static void next_event(struct connection *c, const char *before) {
    char event[512], text[2048];
    int at = sprintf(text, "%s", before), is_last = --c->events_left <= 0;
    int size = sprintf(event, "data: {\"id\":\"chatcmpl-0\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,"
        "\"model\":\"mock\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"tok %016llu\"},\"finish_reason\":%s}]}\n\n",
        (unsigned long long)now_ns(), is_last ? "\"stop\"" : "null");
    at += chunk(text + at, event, size);
    if (is_last) {
        if (c->wants_usage) {
            size = sprintf(event, "data: {\"id\":\"chatcmpl-0\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,"
                "\"model\":\"mock\",\"choices\":[],\"usage\":{\"prompt_tokens\":64,\"completion_tokens\":%d,"
                "\"total_tokens\":%d}}\n\n", c->events, c->events + 64);
            at += chunk(text + at, event, size);
        }
        at += chunk(text + at, "data: [DONE]\n\n", 14);
        at += sprintf(text + at, "0\r\n\r\n");
        c->is_answering = 0;
        drop_timer(c);
    } else {
        c->due_ns += c->pace_ns;
        set_timer(c);
    }
    write_part(c, text, at);
}

/* Answering */

static long long wish(const struct connection *c, const char *name, long long otherwise) {
    const char *from = strstr(c->opening, "[["), *to = from ? strstr(from, "]]") : NULL;
    const char *found = from ? strstr(from, name) : NULL;
    return found && to && found < to ? atoll(found + strlen(name)) : otherwise;
}

static int is_true(const char *text, const char *key) {
    const char *found = strstr(text, key);
    if (!found) return 0;
    found += strlen(key);
    found += strspn(found, " :");
    return !strncmp(found, "true", 4);
}

static void answer(struct connection *c) {
    counted.requests++;
    c->opening[c->opening_size] = 0;
    if (strcmp(c->method, "POST")) {
        char text[256] = "{\"status\":\"ok\"}";
        if (!strcmp(c->path, "/stats"))
            snprintf(text, sizeof text, "{\"accepted\":%llu,\"open\":%llu,\"requests\":%llu,\"reads\":%llu,\"broken_off\":%llu}",
                     counted.accepted, counted.open, counted.requests, counted.reads, counted.broken_off);
        else if (!strcmp(c->path, "/v1/models"))
            strcpy(text, "{\"object\":\"list\",\"data\":[{\"id\":\"mock\",\"object\":\"model\",\"created\":0,\"owned_by\":\"mock\"}]}");
        say(c, "200 OK", text);
    } else if (!c->may_enter) {
        say(c, "401 Unauthorized", "{\"error\":{\"message\":\"the key is wrong\"}}");
    } else if (!strcmp(c->path, "/v1/embeddings") || (!strcmp(c->path, "/v1/chat/completions") && !is_true(c->opening, "\"stream\""))) {
        if (c->in_upload && !c->upload_is_right) {
            say(c, "400 Bad Request", "{\"error\":{\"message\":\"the upload is not what was sent\"}}");
        } else if (c->in_upload) {
            char text[256];
            snprintf(text, sizeof text, "{\"object\":\"chat.completion\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\","
                     "\"content\":\"received %llu\"},\"finish_reason\":\"stop\"}]}", (unsigned long long)c->upload_size);
            say(c, "200 OK", text);
        } else {
            const struct built *built = reply_of(c->path[4] == 'e', wish(c, "reply_bytes=", 480));
            c->reply = built->text;
            c->reply_left = built->whole;
            c->is_answering = 1;
            flush(c);
        }
    } else if (!strcmp(c->path, "/v1/chat/completions")) {
        c->events = c->events_left = wish(c, "events=", 50);
        c->pace_ns = wish(c, "pace_us=", 20000) * 1000;
        c->wants_usage = is_true(c->opening, "\"include_usage\"");
        c->due_ns = now_ns();
        c->is_answering = 1;
        next_event(c, "HTTP/1.1 200 OK\r\nServer: mock\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
    } else {
        say(c, "404 Not Found", "{\"error\":{\"message\":\"there is no such path\"}}");
    }
}

/* Reading */

static void take_body(struct connection *c, const char *data, size_t size) {
    c->body_size += size;
    if (c->opening_size < OPENING) {
        size_t n = size < OPENING - c->opening_size ? size : OPENING - c->opening_size;
        memcpy(c->opening + c->opening_size, data, n);
        size_t before = c->opening_size;
        c->opening_size += n;
        c->opening[c->opening_size] = 0;
        char *found = c->in_upload || size + before < 4096 ? NULL : strstr(c->opening, "base64,");
        if (found) { /* what follows is checked from here on; it begins within the part that has just come */
            size_t begin = found + 7 - c->opening;
            c->in_upload = c->upload_is_right = 1;
            size_t old = begin < before ? before - begin : 0;
            if (old) c->upload_is_right = counts_up(c->opening + begin, old, 0);
            c->upload_size = old;
            size_t skip = begin > before ? begin - before : 0;
            data += skip;
            size -= skip;
        }
    }
    if (c->in_upload == 1) {
        const char *end = memchr(data, '"', size);
        size_t n = end ? (size_t)(end - data) : size;
        c->upload_is_right &= counts_up(data, n, c->upload_size);
        c->upload_size += n;
        if (end) c->in_upload = 2;
    }
}

static void begin_body(struct connection *c) {
    char *line = c->head, *save;
    c->head[c->head_size] = 0;
    c->left = c->is_chunked = c->opening_size = c->body_size = c->upload_size = c->in_upload = c->upload_is_right = 0;
    c->may_enter = !bearer[0];
    char *first = strtok_r(line, "\r\n", &save);
    if (!first || sscanf(first, "%7s %127s", c->method, c->path) != 2) { leave(c); return; }
    while ((line = strtok_r(NULL, "\r\n", &save))) {
        if (!strncasecmp(line, "content-length:", 15)) c->left = strtoull(line + 15, NULL, 10);
        else if (!strncasecmp(line, "transfer-encoding:", 18)) c->is_chunked = 1;
        else if (bearer[0] && !strncasecmp(line, "authorization:", 14)) {
            line += 14;
            line += strspn(line, " ");
            c->may_enter |= !strcmp(line, bearer);
        }
    }
    c->head_size = 0;
    c->state = c->is_chunked ? IN_CHUNK_SIZE : IN_BODY;
}

/* Takes bytes up to the end of `mark` into `head`; whether it is there. */
static int until(struct connection *c, const char **data, size_t *size, const char *mark) {
    size_t length = strlen(mark), old = c->head_size, n = *size;
    if (old + n > HEAD_LIMIT) n = HEAD_LIMIT - old;
    memcpy(c->head + old, *data, n);
    size_t from = old > length ? old - length : 0;
    char *found = memmem(c->head + from, old + n - from, mark, length);
    if (!found && n < *size) { leave(c); return 0; }
    size_t end = found ? (size_t)(found + length - c->head) : old + n;
    *data += end - old;
    *size -= end - old;
    c->head_size = end;
    return found != NULL;
}

static void end_request(struct connection *c) {
    c->state = IN_HEAD;
    c->head_size = 0;
    answer(c);
}

static void take(struct connection *c, const char *data, size_t size) {
    while (c->fd >= 0) {
        size_t n;
        switch (c->state) {
        case IN_HEAD:
            if (!size || !until(c, &data, &size, "\r\n\r\n")) return;
            begin_body(c);
            break;
        case IN_BODY:
        case IN_CHUNK:
            n = size < c->left ? size : c->left;
            if (n) take_body(c, data, n);
            data += n;
            size -= n;
            if ((c->left -= n)) return;
            if (c->state == IN_BODY) end_request(c);
            else c->state = IN_CHUNK_END;
            break;
        case IN_CHUNK_SIZE:
            if (!size || !until(c, &data, &size, "\r\n")) return;
            c->head[c->head_size] = 0;
            c->left = strtoull(c->head, NULL, 16);
            c->head_size = 0;
            c->state = c->left ? IN_CHUNK : IN_TRAILER;
            break;
        case IN_CHUNK_END:
        case IN_TRAILER:
            if (!size || !until(c, &data, &size, "\r\n")) return;
            n = c->head_size;
            c->head_size = 0;
            if (c->state == IN_CHUNK_END) c->state = IN_CHUNK_SIZE;
            else if (n == 2) end_request(c);
            break;
        }
    }
}

static void look(struct connection *c, uint32_t events) {
    static char data[READ];
    if (events & EPOLLOUT) flush(c);
    if (c->fd < 0 || !(events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))) return;
    ssize_t n = recv(c->fd, data, sizeof data, 0);
    if (n > 0) { counted.reads++; take(c, data, n); }
    else if (n == 0 || errno != EAGAIN) leave(c);
}

/* Listening */

static void add(int fd, int listens) {
    struct connection *c = calloc(1, sizeof *c);
    c->fd = fd;
    c->listens = listens;
    if (!listens) { c->head = malloc(HEAD_LIMIT + 1); counted.accepted++; counted.open++; }
    struct epoll_event e = {.events = EPOLLIN | (listens ? 0 : EPOLLRDHUP), .data.ptr = c};
    if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &e)) die("epoll_ctl");
}

static void accept_all(struct connection *c) {
    int fd, one = 1;
    while ((fd = accept4(c->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one); /* does nothing on a Unix socket */
        add(fd, 0);
    }
}

static void listen_tcp(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof at;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (void *)&at, size) || listen(fd, BACKLOG) || getsockname(fd, (void *)&at, &size)) die("listening on TCP");
    fprintf(stderr, "mock_engine: listening on http://127.0.0.1:%d\n", ntohs(at.sin_port));
    add(fd, 1);
}

static void listen_unix(const char *path) {
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof at.sun_path) { errno = ENAMETOOLONG; die(path); }
    strcpy(at.sun_path, path);
    unlink(path);
    if (bind(fd, (void *)&at, sizeof at) || listen(fd, BACKLOG)) die(path);
    fprintf(stderr, "mock_engine: listening on unix:%s\n", path);
    add(fd, 1);
}

int main(int count, char **words) {
    struct epoll_event found[512];
    struct connection *gone[512];
    int lifetime_s = 7200;
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (getenv("API_KEY") && *getenv("API_KEY")) snprintf(bearer, sizeof bearer, "Bearer %s", getenv("API_KEY"));
    poll_fd = epoll_create1(EPOLL_CLOEXEC);
    for (int i = 1; i + 1 < count; i += 2) {
        if (!strcmp(words[i], "--tcp")) listen_tcp(atoi(words[i + 1]));
        else if (!strcmp(words[i], "--unix")) listen_unix(words[i + 1]);
        else if (!strcmp(words[i], "--lifetime")) lifetime_s = atoi(words[i + 1]);
        else { fprintf(stderr, "mock_engine: there is no flag %s\n", words[i]); return 2; }
    }
    alarm(lifetime_s); /* nobody leaves one of these behind for longer */
    for (;;) {
        struct timespec pause, *limit = NULL;
        if (timer_count) {
            uint64_t now = now_ns(), due = timers[0]->due_ns, wait = due > now ? due - now : 0;
            pause = (struct timespec){wait / 1000000000, wait % 1000000000};
            limit = &pause;
        }
        int n = epoll_pwait2(poll_fd, found, 512, limit, NULL), ended = 0;
        if (n < 0 && errno != EINTR) die("epoll_pwait2");
        for (int i = 0; i < n; i++) {
            struct connection *c = found[i].data.ptr;
            if (c->listens) accept_all(c);
            else look(c, found[i].events);
            if (c->fd < 0) gone[ended++] = c;
        }
        for (int i = 0; i < ended; i++) { free(gone[i]->head); free(gone[i]->late); free(gone[i]); }
        for (uint64_t now = now_ns(); timer_count && timers[0]->due_ns <= now;) {
            struct connection *c = timers[0];
            next_event(c, "");
            if (c->fd < 0) { free(c->head); free(c->late); free(c); }
        }
    }
}
