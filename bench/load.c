// Drives one server on this machine and prints the result as a JSON object. One thread, one epoll loop.
//
// usage: load PORT WARM SECONDS PLAN [RATE [random]]
//
//   WARM     seconds of load before the SECONDS that are measured (a closed loop is measured for longer if there have
//            been fewer answers than connections)
//   PLAN     a file with the connections and their requests (below)
//   RATE     requests per second of all connections together, for an open loop. Without it the loop is closed: a
//            connection sends its next request when an answer comes.
//   random   the requests are due at random moments (a Poisson process), not at even distances
//
// The plan, in little-endian uint32: the number of connections; for each its depth (requests in flight at once), the
// number of its leads (requests that are sent once, one after the other, before anything is timed) and the number of
// all its requests, leads included; for each request its time steps, its length in bytes, and the bytes. The requests after
// the leads are sent in a cycle. A connection speaks HTTP/1.1 until an answer is 101; from then on it is a WebSocket
// (RFC 6455). A client's frames must be masked: those of the plan have a mask of zeros, which leaves the payload as it
// is and costs nothing here.
//
// In an open loop each connection has an equal share of the rate, and a latency counts from the moment at which
// the request was due, even if it was sent later. So the latencies include every request that a stall of the server
// delayed, not only those that it had received (coordinated omission; Gil Tene's correction, as in wrk2:
// https://github.com/giltene/wrk2). A closed loop cannot see that; its latencies are those of the requests sent.
//
// stdout: a line "from" when the measured time begins, a line "to" at its end (so that the caller can read other
// clocks), and the object. The program ends when all requests are answered, so that no leftover work of the server
// slows the next measurement. "busy" is the CPU time of this process divided by the measured time, "delayed" the share of the
// time in which others used its core while it was ready to run. If they are close to 1 together, the generator is the
// bottleneck. "turns" counts the wake-ups in that time. It inherits the CPU affinity of its caller.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL
#define PATIENCE (30 * SECOND)  // for the leads, and for the answers that are missing at the end

typedef struct {
  uint32_t steps, length;
  const char *bytes;
} Request;

typedef struct {
  int64_t since;  // when it was sent (closed loop) or due (open loop), nanoseconds
  const Request *request;
} Flight;

typedef struct {
  int fd;  // -1 when the server has closed it
  bool websocket, wants_out;
  uint32_t place, depth, leads, count, led;  // led: leads that are answered
  Request *requests;
  uint32_t next, offset;  // the request to send, and how many of its bytes are sent
  Flight *flights;        // a ring of `depth`; answers are taken to come in the order of the requests
  uint32_t first, flying;
  uint64_t due, taken;  // open loop: requests due so far, and how many of them were sent
  char *in;             // received bytes; [begin, end) is not parsed yet
  size_t begin, end, room;
  uint8_t opcode;  // of the WebSocket message being received
} Connection;

static Connection *connections;
static uint32_t count, ready, open_count;
static int events, timer = -1;
static struct sockaddr_in server;
static double rate;
static int64_t started, from, to, warm, seconds;  // `to` is 0 until the leads are answered
static bool is_random, measuring, over;
static int64_t waiting;  // the longest wait for an answer that came after the measured time of a closed loop
static uint32_t *latencies;  // microseconds
static size_t answers, latency_room;
static uint64_t steps, turns, bad, closed;
static int64_t *moments;  // of a random open loop, until the first that is too late

static int64_t clock_ns(clockid_t id) {
  struct timespec t;
  clock_gettime(id, &t);
  return t.tv_sec * SECOND + t.tv_nsec;
}
static int64_t now(void) { return clock_ns(CLOCK_MONOTONIC); }

static int64_t run_delay(void) {  // the second number there, if the kernel counts it; nanoseconds
  long long run, delay = 0;
  FILE *f = fopen("/proc/self/schedstat", "r");
  if (f && fscanf(f, "%lld %lld", &run, &delay) != 2) delay = 0;
  if (f) fclose(f);
  return delay;
}

static void die(const char *what) {
  fprintf(stderr, "load: %s%s%s\n", what, errno ? ": " : "", errno ? strerror(errno) : "");
  exit(1);
}

static void *grown(void *p, size_t bytes) {
  if (!(p = realloc(p, bytes))) die("memory");
  return p;
}

static void watch(Connection *c, int operation) {
  struct epoll_event e = {.events = EPOLLIN | (c->wants_out ? EPOLLOUT : 0), .data.ptr = c};
  if (epoll_ctl(events, operation, c->fd, &e)) die("epoll_ctl");
}

static void lose(Connection *c) {
  closed++, open_count--;
  close(c->fd);
  c->fd = -1;
}

// When the k-th request of an open loop is due; the connections take turns.
static int64_t due_at(uint64_t k) { return moments ? moments[k] : started + (int64_t)(k * (double)SECOND / rate); }

static void draw_moments(void) {
  srand48(ntohs(server.sin_port));  // of another server: other moments
  double t = started;
  for (size_t n = 0, room = 0; !n || moments[n - 1] < to; n++) {
    if (n == room) moments = grown(moments, (room = 2 * room + 65536) * sizeof *moments);
    moments[n] = t -= log(1 - drand48()) * SECOND / rate;
  }
}

static bool may_send(const Connection *c) {
  if (c->led < c->leads) return c->flying == 0;
  if (ready < count || c->flying == c->depth || (over && !rate)) return false;
  return !rate || c->taken < c->due;
}

static void push(Connection *c) {
  while (c->fd >= 0 && (c->offset || may_send(c))) {
    const Request *r = &c->requests[c->next];
    if (!c->offset) {
      Flight *f = &c->flights[(c->first + c->flying++) % c->depth];
      bool timed = rate && c->led == c->leads;
      *f = (Flight){timed ? due_at(c->taken++ * count + c->place) : now(), r};
    }
    ssize_t n = send(c->fd, r->bytes + c->offset, r->length - c->offset, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) return lose(c);
    if (n > 0) c->offset += n;
    bool partly = c->offset < r->length;
    if (partly != c->wants_out) c->wants_out = partly, watch(c, EPOLL_CTL_MOD);
    if (partly) return;
    c->offset = 0;
    if (++c->next == c->count) c->next = c->leads;
  }
}

static void start(void) {
  started = now(), from = started + warm, to = from + seconds;
  if (is_random) draw_moments();
  for (uint32_t i = 0; i < count; i++) push(&connections[i]);
}

static void complain(const char *data, size_t length) {
  if (!bad++) fprintf(stderr, "load: the first answer that is none: %.*s\n", (int)(length < 600 ? length : 600), data);
}

// A complete answer has been received.
static void take(Connection *c, bool good, const char *data, size_t length) {
  if (!c->flying) return complain(data, length);
  Flight f = c->flights[c->first];
  c->first = (c->first + 1) % c->depth, c->flying--;
  if (!good) complain(data, length);
  if (c->led < c->leads) {
    if (++c->led == c->leads && ++ready == count) start();
    return;
  }
  int64_t t = now();
  if (over && !rate && t - f.since > waiting) waiting = t - f.since;
  bool counts = rate ? f.since >= from && f.since < to : measuring;
  if (!counts || !good) return;
  if (answers == latency_room)
    latencies = grown(latencies, (latency_room = 2 * latency_room + 65536) * sizeof *latencies);
  latencies[answers++] = (t - f.since) / 1000, steps += f.request->steps;
}

// Each of these two returns the length of the answer that begins at `d`, or 0 if it is not complete.

static size_t chunks(const char *d, size_t have) {  // RFC 9112, section 7.1; `d` ends in a zero
  size_t at = 0;
  for (;;) {
    const char *line = memmem(d + at, have - at, "\r\n", 2);
    if (!line) return 0;
    char *stop;
    size_t size = strtoul(d + at, &stop, 16);
    if (stop == d + at) errno = 0, die("a chunk has no size");
    at = line + 2 - d;
    if (!size) {
      while ((line = memmem(d + at, have - at, "\r\n", 2)) && line != d + at) at = line + 2 - d;  // trailers
      return line ? at + 2 : 0;
    }
    if (have - at < size + 2) return 0;
    at += size + 2;
  }
}

static size_t http(Connection *c, const char *d, size_t have) {
  const char *end = memmem(d, have, "\r\n\r\n", 4);
  if (!end) return 0;
  size_t head = end + 4 - d, body = 0;
  int status = atoi(d + 9);  // after "HTTP/1.1 "
  bool told = status == 101 || status == 204;
  for (const char *line = strstr(d, "\r\n") + 2; line < end + 2; line = strstr(line, "\r\n") + 2) {
    if (!told && !strncasecmp(line, "content-length:", 15)) body = strtoul(line + 15, 0, 10), told = true;
    if (!told && !strncasecmp(line, "transfer-encoding: chunked", 26)) {
      if (!(body = chunks(d + head, have - head))) return 0;
      told = true;
    }
  }
  if (!told) errno = 0, die("an answer does not tell its length");
  if (have < head + body) return 0;
  if (status == 101) c->websocket = true;
  take(c, status == 101 || status / 100 == 2, d, head + body);
  return head + body;
}

static size_t frame(Connection *c, const char *data, size_t have) {
  const uint8_t *d = (const uint8_t *)data;
  if (have < 2) return 0;
  size_t size = d[1] & 127, head = size == 126 ? 4 : size == 127 ? 10 : 2;
  if (have < head) return 0;
  if (head > 2) {
    size = 0;
    for (size_t i = 2; i < head; i++) size = size << 8 | d[i];
  }
  if (have < head + size) return 0;
  uint8_t opcode = d[0] & 15;
  if (opcode == 8) return lose(c), head + size;
  if (opcode > 8) return head + size;  // pings: a run ends before a server times out (uvicorn: 20 s)
  if (opcode) c->opcode = opcode;
  if (d[0] & 128) {
    // Bad answers: text to a binary frame, and Cellserve's {"op":"error"...}.
    uint8_t asked = c->flying ? c->flights[c->first].request->bytes[0] & 15 : 0;
    bool error = opcode && size >= 12 && !memcmp(data + head, "{\"op\":\"error\"", 12);
    take(c, c->opcode == asked && !error, data + head, size);
  }
  return head + size;
}

static void receive(Connection *c) {
  if (c->begin == c->end) c->begin = c->end = 0;
  if (c->room - c->end < 65536) {
    if (c->begin) memmove(c->in, c->in + c->begin, c->end - c->begin);
    c->end -= c->begin, c->begin = 0;
    if (c->room - c->end < 65536) c->in = grown(c->in, (c->room = 2 * c->room + 131072) + 1);
  }
  ssize_t n = recv(c->fd, c->in + c->end, c->room - c->end, 0);
  if (n < 0 && errno == EAGAIN) return;
  if (n <= 0) return lose(c);
  c->end += n, c->in[c->end] = 0;
  while (c->fd >= 0 && c->begin < c->end) {
    const char *d = c->in + c->begin;
    size_t length = c->websocket ? frame(c, d, c->end - c->begin) : http(c, d, c->end - c->begin);
    if (!length) break;
    c->begin += length;
  }
  push(c);
}

// Open loop: sends the requests that are due, and sets the timer for the next one.
static void hand_out(void) {
  static uint64_t k;
  if (!to) return;
  for (int64_t t = now(); due_at(k) <= t && due_at(k) < to; k++) {
    Connection *c = &connections[k % count];
    c->due++;
    push(c);
  }
  static int64_t set;
  int64_t next = due_at(k);
  struct itimerspec at = {.it_value = {next / SECOND, next % SECOND}};
  if (next < to && next != set) timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, 0), set = next;
}

static void connect_all(void) {
  for (Connection *c = connections; c < connections + count; c++) {
    int on = 1;
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(c->fd, (struct sockaddr *)&server, sizeof server)) die("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    watch(c, EPOLL_CTL_ADD);
    if (!c->leads) ready++;
  }
  open_count = count;
}

static void read_plan(const char *path) {
  FILE *f = fopen(path, "rb");
  if (!f || fseek(f, 0, SEEK_END)) die(path);
  size_t size = ftell(f);
  rewind(f);
  char *d = grown(0, size), *end = d + size;
  if (fread(d, 1, size, f) != size) die(path);
  fclose(f);
  errno = 0;
#define NUMBER() ({ uint32_t v_; if (end - d < 4) die("the plan ends early"); memcpy(&v_, d, 4); d += 4; v_; })
  count = NUMBER();
  if (!count || !(connections = calloc(count, sizeof *connections))) die("the plan has no connections");
  for (uint32_t i = 0; i < count; i++) {
    Connection *c = &connections[i];
    c->place = i, c->depth = NUMBER(), c->leads = NUMBER(), c->count = NUMBER();
    if (!c->depth || c->count <= c->leads) die("a connection of the plan has nothing to send");
    c->requests = calloc(c->count, sizeof *c->requests), c->flights = calloc(c->depth, sizeof *c->flights);
    for (uint32_t j = 0; j < c->count; j++) {
      Request *r = &c->requests[j];
      r->steps = NUMBER(), r->length = NUMBER(), r->bytes = d;
      if ((size_t)(end - d) < r->length || !r->length) die("the plan ends early");
      d += r->length;
    }
  }
}

static uint64_t owing(void) {  // number of requests that are sent or due but not answered
  uint64_t n = 0;
  for (Connection *c = connections; c < connections + count; c++)
    if (c->fd >= 0) n += c->flying + c->due - c->taken;
  return n;
}

static int order(const void *a, const void *b) {
  uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
  return (x > y) - (x < y);
}

int main(int argc, char **argv) {
  if (argc < 5 || argc > 7) die("usage: load PORT WARM SECONDS PLAN [RATE [random]]");
  warm = (int64_t)(atof(argv[2]) * SECOND), seconds = (int64_t)(atof(argv[3]) * SECOND);
  rate = argc > 5 ? atof(argv[5]) : 0, is_random = argc == 7;
  server = (struct sockaddr_in){AF_INET, htons(atoi(argv[1])), {htonl(INADDR_LOOPBACK)}, {0}};
  read_plan(argv[4]);
  if ((events = epoll_create1(0)) < 0) die("epoll_create1");
  if (rate) {  // epoll_wait sleeps in whole milliseconds, too coarse for a schedule
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = 0};
    if (timer < 0 || epoll_ctl(events, EPOLL_CTL_ADD, timer, &e)) die("timerfd");
  }
  int64_t begun = now(), cpu = 0, delay = 0;
  connect_all();
  if (ready == count) start();
  else for (uint32_t i = 0; i < count; i++) push(&connections[i]);

  struct epoll_event happened[256];
  while (open_count) {
    if (rate) hand_out();
    int n = epoll_wait(events, happened, 256, 10);
    turns += measuring && n;
    for (int i = 0; i < n; i++) {
      Connection *c = happened[i].data.ptr;
      uint64_t expirations;
      if (!c) {
        if (read(timer, &expirations, sizeof expirations) < 0 && errno != EAGAIN) die("timer");
        continue;
      }
      if (c->fd >= 0 && happened[i].events & EPOLLOUT) push(c);
      if (c->fd >= 0 && happened[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(c);
    }
    int64_t t = now();
    if (!to && t - begun > PATIENCE) errno = 0, die("the leading requests were not answered");
    if (!to) continue;
    if (!measuring && !over && t >= from) {
      // In a closed loop the measured time begins and ends at this point of the loop, in an open loop by its schedule.
      if (!rate) from = t, to = t + seconds;
      measuring = true, cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID), delay = run_delay();
      puts("from"), fflush(stdout);
    }
    // A closed loop runs until there are as many answers as connections: with fewer there is no meaningful rate.
    if (measuring && t >= to && (rate || answers >= count || bad || closed || t - to > PATIENCE)) {
      if (rate) hand_out();  // what fell due while this process did not run is sent late, not left out
      else to = t;
      measuring = false, over = true;
      cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu, delay = run_delay() - delay;
      puts("to"), fflush(stdout);
    }
    if (over && (!owing() || t - to > PATIENCE)) break;
  }
  if (!over) puts(measuring ? "to" : "from\nto");  // the server has closed all connections
  uint64_t unanswered = owing();
  qsort(latencies, answers, sizeof *latencies, order);
#define QUANTILE(q) (answers ? latencies[(size_t)((answers - 1) * (q) + 0.5)] / 1e3 : -1.0)
  double time = over ? (to - from) / 1e9 : 0;
  printf("{\"answers\":%zu,\"seconds\":%.6f,\"per_s\":%.2f,\"steps_per_s\":%.2f,\"p50_ms\":%.3f,\"p90_ms\":%.3f,"
         "\"p99_ms\":%.3f,\"max_ms\":%.3f,\"waiting_ms\":%.3f,\"unanswered\":%llu,\"bad\":%llu,\"closed\":%llu,\"busy\":%.4f,"
         "\"delayed\":%.4f,\"turns\":%llu}\n",
         answers, time, over ? answers / time : 0, over ? steps / time : 0, QUANTILE(.5), QUANTILE(.9), QUANTILE(.99),
         QUANTILE(1), waiting / 1e6, (unsigned long long)unanswered, (unsigned long long)bad, (unsigned long long)closed,
         over ? cpu / (double)(to - from) : 0, over ? delay / (double)(to - from) : 0, (unsigned long long)turns);
  return 0;
}
