/* Makes the n-th system call of a class fail, for files below a folder. Preloaded: it sees what Python, torch, Arrow and
   safetensors call alike. Counts are shared with forked processes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CREATE = 1, WRITE = 2, SYNC = 4, MOVE = 8, OPEN = 16, READ = 32 };

static struct state {
    int classes, error, forever;
    long nth, count, failed, each[6];
    char folder[PATH_MAX];
} *state;

__attribute__((constructor)) static void begin(void) {
    state = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

/* Count calls of these classes below a folder; make the nth fail (0: none), and with `forever` all after it. */
void fault_arm(const char *folder, int classes, long nth, int error, int forever) {
    state->classes = 0;
    strncpy(state->folder, folder, PATH_MAX - 1);
    state->nth = nth;
    state->error = error;
    state->forever = forever;
    state->count = state->failed = 0;
    memset(state->each, 0, sizeof state->each);
    state->classes = classes;
}
long fault_calls(int class) { return state->each[class]; }
long fault_failed(void) { return state->failed; }

static int fails(int class, int folder, const char *path) {
    char name[PATH_MAX], link[64];
    if (!state || !(state->classes & class)) return 0;
    if (!path || (path[0] != '/' && folder != AT_FDCWD)) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, name, sizeof name - 1);
        if (length < 0) return 0;
        name[length] = 0;
        path = name;
    }
    if (strncmp(path, state->folder, strlen(state->folder))) return 0;
    __sync_add_and_fetch(&state->each[__builtin_ctz(class)], 1);
    long number = __sync_add_and_fetch(&state->count, 1);
    if (!state->nth || (state->forever ? number < state->nth : number != state->nth)) return 0;
    __sync_add_and_fetch(&state->failed, 1);
    errno = state->error;
    return 1;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
static int opened(int flags) { return flags & O_CREAT ? CREATE : flags & O_ACCMODE ? WRITE : OPEN; }

#define OPENS(name) int name(const char *path, int flags, ...) { \
    REAL(name); va_list more; va_start(more, flags); mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0; \
    va_end(more); return fails(opened(flags), AT_FDCWD, path) ? -1 : real(path, flags, mode); }
OPENS(open)
OPENS(open64)
#define OPENATS(name) int name(int folder, const char *path, int flags, ...) { \
    REAL(name); va_list more; va_start(more, flags); mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0; \
    va_end(more); return fails(opened(flags), folder, path) ? -1 : real(folder, path, flags, mode); }
OPENATS(openat)
OPENATS(openat64)
#define FOPENS(name) FILE *name(const char *path, const char *mode) { \
    REAL(name); return fails(*mode == 'r' ? OPEN : CREATE, AT_FDCWD, path) ? NULL : real(path, mode); }
FOPENS(fopen)
FOPENS(fopen64)

#define ON_FD(type, name, class, parameters, arguments) type name parameters { \
    REAL(name); return fails(class, fd, NULL) ? -1 : real arguments; }
ON_FD(ssize_t, write, WRITE, (int fd, const void *data, size_t n), (fd, data, n))
ON_FD(ssize_t, pwrite, WRITE, (int fd, const void *data, size_t n, off_t at), (fd, data, n, at))
ON_FD(ssize_t, pwrite64, WRITE, (int fd, const void *data, size_t n, off64_t at), (fd, data, n, at))
ON_FD(ssize_t, writev, WRITE, (int fd, const struct iovec *parts, int n), (fd, parts, n))
ON_FD(int, ftruncate, WRITE, (int fd, off_t size), (fd, size))
ON_FD(int, ftruncate64, WRITE, (int fd, off64_t size), (fd, size))
ON_FD(ssize_t, sendfile, WRITE, (int fd, int from, off_t *at, size_t n), (fd, from, at, n))
ON_FD(ssize_t, sendfile64, WRITE, (int fd, int from, off64_t *at, size_t n), (fd, from, at, n))
ON_FD(int, fsync, SYNC, (int fd), (fd))
ON_FD(int, fdatasync, SYNC, (int fd), (fd))
ON_FD(ssize_t, read, READ, (int fd, void *data, size_t n), (fd, data, n))
ON_FD(ssize_t, pread, READ, (int fd, void *data, size_t n, off_t at), (fd, data, n, at))
ON_FD(ssize_t, pread64, READ, (int fd, void *data, size_t n, off64_t at), (fd, data, n, at))
ON_FD(ssize_t, readv, READ, (int fd, const struct iovec *parts, int n), (fd, parts, n))

#define ON_PATH(name, class, parameters, arguments) int name parameters { \
    REAL(name); return fails(class, AT_FDCWD, path) ? -1 : real arguments; }
ON_PATH(mkdir, CREATE, (const char *path, mode_t mode), (path, mode))
ON_PATH(rename, MOVE, (const char *path, const char *to), (path, to))
ON_PATH(link, CREATE, (const char *path, const char *to), (path, to))
ON_PATH(unlink, MOVE, (const char *path), (path))
ON_PATH(rmdir, MOVE, (const char *path), (path))
ON_PATH(remove, MOVE, (const char *path), (path))
#define ON_AT(name, class, parameters, arguments) int name parameters { \
    REAL(name); return fails(class, folder, path) ? -1 : real arguments; }
ON_AT(mkdirat, CREATE, (int folder, const char *path, mode_t mode), (folder, path, mode))
ON_AT(renameat, MOVE, (int folder, const char *path, int other, const char *to), (folder, path, other, to))
ON_AT(linkat, CREATE, (int folder, const char *path, int other, const char *to, int flags), (folder, path, other, to, flags))
ON_AT(unlinkat, MOVE, (int folder, const char *path, int flags), (folder, path, flags))
