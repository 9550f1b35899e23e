/* Makes the n-th call of some kinds on files at or below some paths fail, end early, be told by a
 * signal, or be the process's last. Preload it, and arm it by the environment:
 *
 *     cc -shared -fPIC -O1 -o inject.so inject.c -ldl
 *     INJECT="rename,fsync 3 kill_before 0 /some/folder:/some/file" INJECT_LOG=calls.txt \
 *         LD_PRELOAD=./inject.so python -m outliermerge run spec.yaml
 *
 * INJECT is "KINDS NUMBER MODE VALUE PATHS", one space between:
 *   KINDS   names of `kind_names` below, by commas, or `all`;
 *   NUMBER  of the call among all calls of these kinds on these paths, from 0;
 *   MODE    err           the call fails with the errno VALUE
 *           persist       so does every later one
 *           short         half is read or written (of a whole multiple of VALUE bytes, where not 0)
 *           eof           a read finds the end of the file
 *           torn          half is written, then SIGKILL; of what has no half, all
 *           kill_before, kill_after       SIGKILL
 *           signal_before, signal_after   signal VALUE, then all goes on (SIGSTOP stops it there)
 *           log           nothing
 *   PATHS   by colons. A call on two names (rename, link) is on both.
 * Calls are written to the file INJECT_LOG, a line each: "NUMBER KIND FUNCTION PATH", and the one
 * that was hit once more with "hit " before it. Only the first process that is started is armed,
 * and what it forks: the variables are taken out of the environment.
 *
 * By ctypes: inject_arm, inject_off, inject_calls, inject_calls_of, inject_hits. The counts are in
 * memory that forks share, so that a parent can ask for those of a child that was killed. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

typedef enum {
    OPEN, CLOSE, READ, PREAD, PREADV, WRITE, PWRITE, PWRITEV, COPY, FSYNC, FALLOCATE, TRUNCATE,
    RENAME, LINK, SYMLINK, UNLINK, RMDIR, MKDIR, LOCK, OPENDIR, READDIR, STAT, STATVFS, MMAP,
    ATTRIBUTES, NUM_KINDS
} Kind;
static const char *const kind_names[NUM_KINDS] = {
    "open", "close", "read", "pread", "preadv", "write", "pwrite", "pwritev", "copy", "fsync",
    "fallocate", "truncate", "rename", "link", "symlink", "unlink", "rmdir", "mkdir", "lock",
    "opendir", "readdir", "stat", "statvfs", "mmap", "attributes",
};

typedef enum {
    OFF, LOG, ERR, PERSIST, SHORT, END_OF_FILE, TORN, KILL_BEFORE, KILL_AFTER, SIGNAL_BEFORE,
    SIGNAL_AFTER, NUM_MODES
} Mode;
static const char *const mode_names[NUM_MODES] = {
    "off", "log", "err", "persist", "short", "eof", "torn", "kill_before", "kill_after",
    "signal_before", "signal_after",
};

static struct {
    volatile Mode mode;
    unsigned kinds;
    long number;
    int value;
    char paths[4 * PATH_MAX]; /* by colons */
    int log;
} armed = {.log = -1};

typedef struct {
    atomic_long calls, hits, calls_of[NUM_KINDS];
} Counts;
static Counts own_counts, *counts = &own_counts;

/* Paths of calls. */

/* Return the path of a descriptor, in memory of this thread. */
static const char *path_of(int file) {
    static __thread char path[PATH_MAX];
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    return path;
}

/* Return a path that may be relative to a folder. One thread has two of them at a time. */
static const char *path_at(int folder, const char *path) {
    static __thread char both[2][2 * PATH_MAX];
    static __thread int next;
    char *whole = both[next = !next], here[PATH_MAX];
    if (path == NULL) return "";
    if (path[0] == '/') return path;
    const char *above = folder == AT_FDCWD ? getcwd(here, sizeof here) : path_of(folder);
    snprintf(whole, sizeof both[0], "%s%s%s", above ? above : "", path[0] ? "/" : "", path);
    return whole;
}

static int is_watched(const char *path) {
    for (const char *start = armed.paths; *start;) {
        size_t length = strcspn(start, ":"), bare = length;
        while (bare > 1 && start[bare - 1] == '/') bare--;
        if (bare && !strncmp(path, start, bare) && (path[bare] == 0 || path[bare] == '/')) return 1;
        start += length + (start[length] == ':');
    }
    return 0;
}

/* What happens to calls. */

static void tell(int number) {
    if (number == SIGKILL || number == SIGSTOP) /* at once: to this thread, and so to all */
        syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), number);
    else /* as from outside: the system chooses the thread */
        kill(getpid(), number);
}

static void write_log(const char *text, size_t length) {
    if (armed.log >= 0) syscall(SYS_write, armed.log, text, length);
}

/* Count a call; return what is to become of it, LOG for nothing. errno is set for ERR. */
static Mode before(Kind kind, const char *function, const char *path, const char *other) {
    int kept = errno;
    if (!is_watched(path) && !(other != NULL && is_watched(other))) {
        errno = kept;
        return LOG;
    }
    long number = atomic_fetch_add(&counts->calls, 1);
    atomic_fetch_add(&counts->calls_of[kind], 1);
    char line[4 * PATH_MAX + 100] = "hit ";
    int length = snprintf(line + 4, sizeof line - 4, "%ld %s %s %s%s%s\n", number,
                          kind_names[kind], function, path, other ? " -> " : "",
                          other ? other : "");
    write_log(line + 4, (size_t)length);
    Mode mode = armed.mode;
    int is_hit = mode == PERSIST ? number >= armed.number : mode != LOG && number == armed.number;
    if (!is_hit) {
        errno = kept;
        return LOG;
    }
    if (mode == PERSIST) mode = ERR;
    atomic_fetch_add(&counts->hits, 1);
    write_log(line, (size_t)length + 4);
    if (mode == KILL_BEFORE) tell(SIGKILL);
    if (mode == SIGNAL_BEFORE) tell(armed.value);
    errno = mode == ERR ? armed.value : kept;
    return mode;
}

static void after(Mode mode) {
    int kept = errno;
    if (mode == KILL_AFTER || mode == TORN) tell(SIGKILL);
    if (mode == SIGNAL_AFTER) tell(armed.value);
    errno = kept;
}

/* Paths are looked up only where the kind is watched. */
#define BEFORE(kind, path, other) \
    (armed.mode != OFF && armed.kinds >> (kind) & 1 ? before(kind, __func__, path, other) : LOG)

/* The function that this file stands before; found again at each call would be slow. */
#define NEXT(type, name, parameters) \
    static type(*next) parameters; \
    if (next == NULL) next = (type(*) parameters)dlsym(RTLD_NEXT, #name)

static size_t half(size_t all) {
    size_t step = armed.value > 0 ? (size_t)armed.value : 1, part = all / 2 / step * step;
    return part ? part : all;
}

/* What either is done or fails. */
#define WHOLE(type, name, kind, failure, path, other, parameters, arguments) \
    type name parameters { \
        NEXT(type, name, parameters); \
        Mode mode = BEFORE(kind, path, other); \
        if (mode == ERR) return failure; \
        type result = next arguments; \
        after(mode); \
        return result; \
    }

/* What moves up to `num` bytes of a buffer. */
#define PART(name, kind, file, num, parameters, arguments) \
    ssize_t name parameters { \
        NEXT(ssize_t, name, parameters); \
        Mode mode = BEFORE(kind, path_of(file), NULL); \
        if (mode == ERR) return -1; \
        if (mode == END_OF_FILE) return 0; \
        if (mode == SHORT || mode == TORN) num = half(num); \
        ssize_t result = next arguments; \
        after(mode); \
        return result; \
    }

/* What moves the bytes of several buffers: half of them is half of the first. */
#define PARTS(name, kind, parameters, arguments) \
    ssize_t name parameters { \
        NEXT(ssize_t, name, parameters); \
        Mode mode = BEFORE(kind, path_of(file), NULL); \
        if (mode == ERR) return -1; \
        if (mode == END_OF_FILE) return 0; \
        struct iovec first; \
        if ((mode == SHORT || mode == TORN) && num > 0) { \
            first = (struct iovec){parts->iov_base, half(parts->iov_len)}; \
            parts = &first; \
            num = 1; \
        } \
        ssize_t result = next arguments; \
        after(mode); \
        return result; \
    }

PART(read, READ, file, num, (int file, void *to, size_t num), (file, to, num))
PART(pread, PREAD, file, num, (int file, void *to, size_t num, off_t at), (file, to, num, at))
PART(pread64, PREAD, file, num, (int file, void *to, size_t num, off_t at), (file, to, num, at))
PART(write, WRITE, file, num, (int file, const void *from, size_t num), (file, from, num))
PART(pwrite, PWRITE, file, num, (int file, const void *from, size_t num, off_t at),
     (file, from, num, at))
PART(pwrite64, PWRITE, file, num, (int file, const void *from, size_t num, off_t at),
     (file, from, num, at))
PARTS(readv, READ, (int file, const struct iovec *parts, int num), (file, parts, num))
PARTS(writev, WRITE, (int file, const struct iovec *parts, int num), (file, parts, num))
PARTS(preadv, PREADV, (int file, const struct iovec *parts, int num, off_t at),
      (file, parts, num, at))
PARTS(preadv64, PREADV, (int file, const struct iovec *parts, int num, off_t at),
      (file, parts, num, at))
PARTS(preadv2, PREADV, (int file, const struct iovec *parts, int num, off_t at, int flags),
      (file, parts, num, at, flags))
PARTS(preadv64v2, PREADV, (int file, const struct iovec *parts, int num, off_t at, int flags),
      (file, parts, num, at, flags))
PARTS(pwritev, PWRITEV, (int file, const struct iovec *parts, int num, off_t at),
      (file, parts, num, at))
PARTS(pwritev64, PWRITEV, (int file, const struct iovec *parts, int num, off_t at),
      (file, parts, num, at))
PARTS(pwritev2, PWRITEV, (int file, const struct iovec *parts, int num, off_t at, int flags),
      (file, parts, num, at, flags))
PARTS(pwritev64v2, PWRITEV, (int file, const struct iovec *parts, int num, off_t at, int flags),
      (file, parts, num, at, flags))

/* Copies within the kernel are on the file that is written. */
PART(copy_file_range, COPY, to, num,
     (int from, off_t *from_at, int to, off_t *to_at, size_t num, unsigned flags),
     (from, from_at, to, to_at, num, flags))
PART(sendfile, COPY, to, num, (int to, int from, off_t *at, size_t num), (to, from, at, num))
PART(sendfile64, COPY, to, num, (int to, int from, off_t *at, size_t num), (to, from, at, num))
PART(splice, COPY, to, num,
     (int from, off_t *from_at, int to, off_t *to_at, size_t num, unsigned flags),
     (from, from_at, to, to_at, num, flags))

#define OPENS(name, folder, parameters, arguments, declared) \
    int name parameters { \
        NEXT(int, name, declared); \
        va_list more; \
        va_start(more, flags); \
        mode_t rights = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        Mode mode = BEFORE(OPEN, path_at(folder, path), NULL); \
        if (mode == ERR) return -1; \
        int result = next arguments; \
        after(mode); \
        return result; \
    }
OPENS(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, rights),
      (const char *, int, mode_t))
OPENS(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, rights),
      (const char *, int, mode_t))
OPENS(openat, folder, (int folder, const char *path, int flags, ...),
      (folder, path, flags, rights), (int, const char *, int, mode_t))
OPENS(openat64, folder, (int folder, const char *path, int flags, ...),
      (folder, path, flags, rights), (int, const char *, int, mode_t))
WHOLE(FILE *, fopen, OPEN, NULL, path_at(AT_FDCWD, path), NULL, (const char *path, const char *how),
      (path, how))
WHOLE(FILE *, fopen64, OPEN, NULL, path_at(AT_FDCWD, path), NULL,
      (const char *path, const char *how), (path, how))

/* The system gives the descriptor up even where closing fails. */
int close(int file) {
    NEXT(int, close, (int));
    Mode mode = BEFORE(CLOSE, path_of(file), NULL);
    int kept = errno, result = next(file);
    if (mode == ERR) {
        errno = kept;
        return -1;
    }
    after(mode);
    return result;
}

WHOLE(int, fsync, FSYNC, -1, path_of(file), NULL, (int file), (file))
WHOLE(int, fdatasync, FSYNC, -1, path_of(file), NULL, (int file), (file))
WHOLE(int, syncfs, FSYNC, -1, path_of(file), NULL, (int file), (file))

/* These two return the errno. */
WHOLE(int, posix_fallocate, FALLOCATE, errno, path_of(file), NULL, (int file, off_t at, off_t num),
      (file, at, num))
WHOLE(int, posix_fallocate64, FALLOCATE, errno, path_of(file), NULL,
      (int file, off_t at, off_t num), (file, at, num))
WHOLE(int, fallocate, FALLOCATE, -1, path_of(file), NULL, (int file, int how, off_t at, off_t num),
      (file, how, at, num))
WHOLE(int, fallocate64, FALLOCATE, -1, path_of(file), NULL,
      (int file, int how, off_t at, off_t num), (file, how, at, num))
WHOLE(int, ftruncate, TRUNCATE, -1, path_of(file), NULL, (int file, off_t num), (file, num))
WHOLE(int, ftruncate64, TRUNCATE, -1, path_of(file), NULL, (int file, off_t num), (file, num))
WHOLE(int, truncate, TRUNCATE, -1, path_at(AT_FDCWD, path), NULL, (const char *path, off_t num),
      (path, num))
WHOLE(int, truncate64, TRUNCATE, -1, path_at(AT_FDCWD, path), NULL, (const char *path, off_t num),
      (path, num))

WHOLE(int, rename, RENAME, -1, path_at(AT_FDCWD, old), path_at(AT_FDCWD, new),
      (const char *old, const char *new), (old, new))
WHOLE(int, renameat, RENAME, -1, path_at(from, old), path_at(to, new),
      (int from, const char *old, int to, const char *new), (from, old, to, new))
WHOLE(int, renameat2, RENAME, -1, path_at(from, old), path_at(to, new),
      (int from, const char *old, int to, const char *new, unsigned flags),
      (from, old, to, new, flags))
WHOLE(int, link, LINK, -1, path_at(AT_FDCWD, old), path_at(AT_FDCWD, new),
      (const char *old, const char *new), (old, new))
WHOLE(int, linkat, LINK, -1, path_at(from, old), path_at(to, new),
      (int from, const char *old, int to, const char *new, int flags), (from, old, to, new, flags))
/* What a link points to is a text, not a file that is touched. */
WHOLE(int, symlink, SYMLINK, -1, path_at(AT_FDCWD, path), NULL,
      (const char *target, const char *path), (target, path))
WHOLE(int, symlinkat, SYMLINK, -1, path_at(folder, path), NULL,
      (const char *target, int folder, const char *path), (target, folder, path))
WHOLE(int, unlink, UNLINK, -1, path_at(AT_FDCWD, path), NULL, (const char *path), (path))
WHOLE(int, unlinkat, flags & AT_REMOVEDIR ? RMDIR : UNLINK, -1, path_at(folder, path), NULL,
      (int folder, const char *path, int flags), (folder, path, flags))
WHOLE(int, remove, UNLINK, -1, path_at(AT_FDCWD, path), NULL, (const char *path), (path))
WHOLE(int, rmdir, RMDIR, -1, path_at(AT_FDCWD, path), NULL, (const char *path), (path))
WHOLE(int, mkdir, MKDIR, -1, path_at(AT_FDCWD, path), NULL, (const char *path, mode_t rights),
      (path, rights))
WHOLE(int, mkdirat, MKDIR, -1, path_at(folder, path), NULL,
      (int folder, const char *path, mode_t rights), (folder, path, rights))

WHOLE(int, flock, LOCK, -1, path_of(file), NULL, (int file, int how), (file, how))
WHOLE(int, lockf, LOCK, -1, path_of(file), NULL, (int file, int how, off_t num), (file, how, num))
WHOLE(int, lockf64, LOCK, -1, path_of(file), NULL, (int file, int how, off_t num),
      (file, how, num))
static int is_lock(int command) {
    return command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK ||
           command == F_OFD_SETLKW;
}
#define CONTROLS(name) \
    int name(int file, int command, ...) { \
        NEXT(int, name, (int, int, void *)); \
        va_list more; \
        va_start(more, command); \
        void *argument = va_arg(more, void *); \
        va_end(more); \
        Mode mode = is_lock(command) ? BEFORE(LOCK, path_of(file), NULL) : LOG; \
        if (mode == ERR) return -1; \
        int result = next(file, command, argument); \
        after(mode); \
        return result; \
    }
CONTROLS(fcntl)
CONTROLS(fcntl64)

WHOLE(DIR *, opendir, OPENDIR, NULL, path_at(AT_FDCWD, path), NULL, (const char *path), (path))
WHOLE(DIR *, fdopendir, OPENDIR, NULL, path_of(file), NULL, (int file), (file))
WHOLE(struct dirent *, readdir, READDIR, NULL, path_of(dirfd(folder)), NULL, (DIR *folder),
      (folder))
WHOLE(struct dirent64 *, readdir64, READDIR, NULL, path_of(dirfd(folder)), NULL, (DIR *folder),
      (folder))

#define STATS(suffix, status) \
    WHOLE(int, stat##suffix, STAT, -1, path_at(AT_FDCWD, path), NULL, \
          (const char *path, struct status *to), (path, to)) \
    WHOLE(int, lstat##suffix, STAT, -1, path_at(AT_FDCWD, path), NULL, \
          (const char *path, struct status *to), (path, to)) \
    WHOLE(int, fstat##suffix, STAT, -1, path_of(file), NULL, (int file, struct status *to), \
          (file, to)) \
    WHOLE(int, fstatat##suffix, STAT, -1, path_at(folder, path), NULL, \
          (int folder, const char *path, struct status *to, int flags), \
          (folder, path, to, flags))
STATS(, stat)
STATS(64, stat64)
WHOLE(int, statx, STAT, -1, path_at(folder, path), NULL,
      (int folder, const char *path, int flags, unsigned mask, struct statx *to),
      (folder, path, flags, mask, to))
WHOLE(int, access, STAT, -1, path_at(AT_FDCWD, path), NULL, (const char *path, int how),
      (path, how))
WHOLE(int, statvfs, STATVFS, -1, path_at(AT_FDCWD, path), NULL,
      (const char *path, struct statvfs *to), (path, to))
WHOLE(int, fstatvfs, STATVFS, -1, path_of(file), NULL, (int file, struct statvfs *to), (file, to))
WHOLE(int, statvfs64, STATVFS, -1, path_at(AT_FDCWD, path), NULL,
      (const char *path, struct statvfs64 *to), (path, to))
WHOLE(int, fstatvfs64, STATVFS, -1, path_of(file), NULL, (int file, struct statvfs64 *to),
      (file, to))

/* Memory of no file is let through before anything is looked up: the loader maps too. */
#define MAPS(name) \
    void *name(void *at, size_t num, int rights, int flags, int file, off_t first) { \
        NEXT(void *, name, (void *, size_t, int, int, int, off_t)); \
        Mode mode = file < 0 ? LOG : BEFORE(MMAP, path_of(file), NULL); \
        if (mode == ERR) return MAP_FAILED; \
        void *result = next(at, num, rights, flags, file, first); \
        after(mode); \
        return result; \
    }
MAPS(mmap)
MAPS(mmap64)

WHOLE(int, chmod, ATTRIBUTES, -1, path_at(AT_FDCWD, path), NULL, (const char *path, mode_t rights),
      (path, rights))
WHOLE(int, fchmod, ATTRIBUTES, -1, path_of(file), NULL, (int file, mode_t rights), (file, rights))
WHOLE(int, fchmodat, ATTRIBUTES, -1, path_at(folder, path), NULL,
      (int folder, const char *path, mode_t rights, int flags), (folder, path, rights, flags))
WHOLE(int, utimensat, ATTRIBUTES, -1, path_at(folder, path), NULL,
      (int folder, const char *path, const struct timespec times[2], int flags),
      (folder, path, times, flags))
WHOLE(int, futimens, ATTRIBUTES, -1, path_of(file), NULL,
      (int file, const struct timespec times[2]), (file, times))

/* Arming. */

void inject_off(void) { armed.mode = OFF; }

/* Return 0, or -1 where a name is unknown. Calls are logged to a descriptor, -1 for none. */
int inject_arm(const char *kinds, long number, const char *mode, int value, const char *paths,
               int log) {
    unsigned chosen = 0;
    Mode found = OFF;
    inject_off();
    for (const char *start = kinds; *start;) {
        size_t length = strcspn(start, ",");
        unsigned one = length == 3 && !strncmp(start, "all", 3) ? (1u << NUM_KINDS) - 1 : 0;
        for (int i = 0; i < NUM_KINDS; i++)
            if (strlen(kind_names[i]) == length && !strncmp(start, kind_names[i], length))
                one = 1u << i;
        if (!one) return -1;
        chosen |= one;
        start += length + (start[length] == ',');
    }
    for (int i = 0; i < NUM_MODES; i++)
        if (!strcmp(mode, mode_names[i])) found = (Mode)i;
    if ((found == OFF && strcmp(mode, "off")) || strlen(paths) >= sizeof armed.paths) return -1;
    armed.kinds = chosen;
    armed.number = number;
    armed.value = value;
    armed.log = log;
    strcpy(armed.paths, paths);
    atomic_store(&counts->calls, 0);
    atomic_store(&counts->hits, 0);
    for (int i = 0; i < NUM_KINDS; i++) atomic_store(&counts->calls_of[i], 0);
    armed.mode = found;
    return 0;
}

long inject_calls(void) { return atomic_load(&counts->calls); }
long inject_hits(void) { return atomic_load(&counts->hits); }
long inject_calls_of(const char *kind) {
    for (int i = 0; i < NUM_KINDS; i++)
        if (!strcmp(kind, kind_names[i])) return atomic_load(&counts->calls_of[i]);
    return -1;
}

__attribute__((constructor)) static void start(void) {
    void *shared = mmap(NULL, sizeof *counts, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                        -1, 0);
    if (shared != MAP_FAILED) counts = shared;
    const char *wanted = getenv("INJECT"), *log = getenv("INJECT_LOG");
    if (wanted == NULL) return;
    char kinds[512], mode[32];
    long number;
    int value, used = 0;
    int file = log ? open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
    int known = sscanf(wanted, "%511s %ld %31s %d %n", kinds, &number, mode, &value, &used) == 4 &&
                inject_arm(kinds, number, mode, value, wanted + used, file) == 0;
    unsetenv("INJECT");
    unsetenv("INJECT_LOG");
    unsetenv("LD_PRELOAD");
    if (!known) {
        fprintf(stderr, "inject.c: INJECT is not as its first lines say\n");
        _exit(99);
    }
}
