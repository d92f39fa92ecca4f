/* Preloaded: fails, cuts short or kills at the n-th call that changes a file under a watched folder, and tells all calls.
   Build: cc -O1 -shared -fPIC -o faults.so faults.c -ldl */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, FAIL_ONCE, FAIL_ON, KILL_BEFORE, KILL_AFTER, SHORT_ONCE };

static char watched[4096];
static int mode = OFF, error = EIO, trace = -1;
static long nth = 0, count = 0;

void faults_watch(const char *folder, int descriptor) {
    strncpy(watched, folder, sizeof watched - 1);
    trace = descriptor;
}
void faults_set(int new_mode, long at, int number) { mode = new_mode; nth = at; error = number; count = 0; }
long faults_count(void) { return count; }

static void tell(const char *call, const char *path) {
    char line[4200];
    if (trace < 0) return;
    int n = snprintf(line, sizeof line, "%s %s\n", call, path);
    syscall(SYS_write, trace, line, n);
}
void faults_mark(const char *text) { tell("mark", text); }

static int is_watched(const char *path) { return watched[0] && path && !strncmp(path, watched, strlen(watched)); }

static int named(int descriptor, char *path, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t n = readlink(link, path, size - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return is_watched(path);
}

/* 0: go on. 1: fail with errno set. 2: cut short. 3: do it, then die. */
static int decide(const char *call, const char *path) {
    tell(call, path);
    count++;
    if (mode == OFF || count < nth) return 0;
    if (mode == FAIL_ON || (count == nth && mode == FAIL_ONCE)) { errno = error; return 1; }
    if (count != nth) return 0;
    if (mode == KILL_BEFORE) kill(getpid(), SIGKILL);
    return mode == SHORT_ONCE ? 2 : mode == KILL_AFTER ? 3 : 0;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define END(result) do { __typeof__(result) r_ = (result); if (d == 3) kill(getpid(), SIGKILL); return r_; } while (0)

#define ON_DESCRIPTOR(type, name, parameters, arguments, cut)                         \
    type name parameters {                                                            \
        REAL(name);                                                                   \
        char path[4096];                                                              \
        if (!named(fd, path, sizeof path)) return real arguments;                     \
        int d = decide(#name, path);                                                  \
        if (d == 1) return -1;                                                        \
        if (d == 2) { cut; }                                                          \
        END(real arguments);                                                          \
    }

ON_DESCRIPTOR(ssize_t, write, (int fd, const void *b, size_t n), (fd, b, n), n = n > 1 ? n / 2 : n)
ON_DESCRIPTOR(ssize_t, pwrite, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o), n = n > 1 ? n / 2 : n)
ON_DESCRIPTOR(ssize_t, pwrite64, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o), n = n > 1 ? n / 2 : n)
ON_DESCRIPTOR(ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n), (void)0)
ON_DESCRIPTOR(int, fsync, (int fd), (fd), (void)0)
ON_DESCRIPTOR(int, fdatasync, (int fd), (fd), (void)0)
ON_DESCRIPTOR(int, ftruncate, (int fd, off_t o), (fd, o), (void)0)
ON_DESCRIPTOR(int, ftruncate64, (int fd, off64_t o), (fd, o), (void)0)

#define ON_PATH(name, parameters, arguments, which)        \
    int name parameters {                                  \
        REAL(name);                                        \
        if (!is_watched(which)) return real arguments;     \
        int d = decide(#name, which);                      \
        if (d == 1) return -1;                             \
        END(real arguments);                               \
    }

ON_PATH(rename, (const char *a, const char *b), (a, b), b)
ON_PATH(renameat, (int f, const char *a, int g, const char *b), (f, a, g, b), b)
ON_PATH(unlink, (const char *a), (a), a)
ON_PATH(mkdir, (const char *a, mode_t m), (a, m), a)
