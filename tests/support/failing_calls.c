/* LD_PRELOAD: calls that change files below the folder $FAILING_BELOW are counted, and some of them fail.
 *
 * fail_calls(first, count, error, kind): from the `first` such call on (1: the next), `count` calls fail with `error`. kind 0: it
 * is not made; 1: it is made, and fails all the same; 2: a write writes half of it and succeeds, other calls fail as of 0.
 * failed_calls(): how many have failed since; failed_call(): the name of the first of them. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long seen, first, count, failed;
static atomic_int error_number, kind;
static const char *_Atomic name_of_first;

void fail_calls(long from, long how_many, int error, int how) {
    first = 0;
    seen = failed = 0;
    name_of_first = "";
    error_number = error;
    kind = how;
    count = how_many;
    first = from;
}

long failed_calls(void) { return failed; }

const char *failed_call(void) { return name_of_first; }

static int is_below(const char *path) {
    const char *folder = getenv("FAILING_BELOW");
    return folder && path && strncmp(path, folder, strlen(folder)) == 0;
}

static int is_file_below(int file) {
    char link[32], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_below(path);
}

/* Whether this call, which is about our files, is to fail. */
static int fails(const char *name) {
    if (!first) return 0;
    long number = ++seen, from = first;
    if (!from || number < from || number >= from + count) return 0;
    if (failed++ == 0) name_of_first = name;
    return 1;
}

#define REAL(type, name) \
    static type real; \
    if (!real) real = (type)dlsym(RTLD_NEXT, name)
#define FAIL() return (errno = error_number, -1)

#define SIZED(name, type, parameters, arguments, shortened) \
    ssize_t name parameters { \
        REAL(type, #name); \
        if (!first || !is_file_below(file) || !fails(#name)) return real arguments; \
        if (kind == 2) { size = shortened; return real arguments; } \
        if (kind == 1) (void)!real arguments; \
        FAIL(); \
    }
#define PLAIN(name, type, parameters, arguments, ours) \
    int name parameters { \
        REAL(type, #name); \
        if (!first || !(ours) || !fails(#name)) return real arguments; \
        if (kind == 1) (void)!real arguments; \
        FAIL(); \
    }

typedef ssize_t (*write_type)(int, const void *, size_t);
typedef ssize_t (*writev_type)(int, const struct iovec *, int);
typedef ssize_t (*pwrite_type)(int, const void *, size_t, off_t);
typedef ssize_t (*pwritev_type)(int, const struct iovec *, int, off_t);
typedef ssize_t (*pwritev2_type)(int, const struct iovec *, int, off_t, int);
typedef int (*file_type)(int);
typedef int (*truncate_type)(int, off_t);
typedef int (*path_type)(const char *);
typedef int (*at_type)(int, const char *, int);
typedef int (*mkdir_type)(const char *, mode_t);
typedef int (*msync_type)(void *, size_t, int);
typedef int (*open_type)(const char *, int, ...);
typedef int (*openat_type)(int, const char *, int, ...);

SIZED(write, write_type, (int file, const void *data, size_t size), (file, data, size), size / 2)
SIZED(writev, writev_type, (int file, const struct iovec *parts, int size), (file, parts, size), (size + 1) / 2)
SIZED(pwrite, pwrite_type, (int file, const void *data, size_t size, off_t at), (file, data, size, at), size / 2)
SIZED(pwrite64, pwrite_type, (int file, const void *data, size_t size, off_t at), (file, data, size, at), size / 2)
SIZED(pwritev, pwritev_type, (int file, const struct iovec *parts, int size, off_t at), (file, parts, size, at), (size + 1) / 2)
SIZED(pwritev64, pwritev_type, (int file, const struct iovec *parts, int size, off_t at), (file, parts, size, at), (size + 1) / 2)
SIZED(pwritev2, pwritev2_type, (int file, const struct iovec *parts, int size, off_t at, int flags),
      (file, parts, size, at, flags), (size + 1) / 2)
SIZED(pwritev64v2, pwritev2_type, (int file, const struct iovec *parts, int size, off_t at, int flags),
      (file, parts, size, at, flags), (size + 1) / 2)
PLAIN(fdatasync, file_type, (int file), (file), is_file_below(file))
PLAIN(fsync, file_type, (int file), (file), is_file_below(file))
PLAIN(ftruncate, truncate_type, (int file, off_t size), (file, size), is_file_below(file))
PLAIN(ftruncate64, truncate_type, (int file, off_t size), (file, size), is_file_below(file))
PLAIN(unlink, path_type, (const char *path), (path), is_below(path))
PLAIN(unlinkat, at_type, (int folder, const char *path, int flags), (folder, path, flags), is_below(path))
PLAIN(mkdir, mkdir_type, (const char *path, mode_t mode), (path, mode), is_below(path))
PLAIN(msync, msync_type, (void *from, size_t size, int flags), (from, size, flags), 1)

/* Opening has no kind 1: the descriptor would be lost. */
#define OPEN(name, type, parameters, arguments) \
    int name parameters { \
        REAL(type, #name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (first && is_below(path) && fails(#name)) FAIL(); \
        return real arguments; \
    }
OPEN(open, open_type, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, open_type, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, openat_type, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
OPEN(openat64, openat_type, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
