// Faults of the file system, made to order: `LD_PRELOAD=file_faults.so python ...`
//
// Counts the calls by which this process changes what is below one directory, whoever makes them:
// Python, Arrow, safetensors, torch. At the n-th of them it does what it was armed for. Not seen
// are what stdio writes (`fwrite`), memory maps and processes that are started; not counted, to
// make a directory that is there, and to remove what is not.

#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fcntl.h>
#include <mutex>
#include <string>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

namespace {

enum Action { NOTHING, LOOK, KILL, FULL, SIGNAL, LIMIT };

Action action = NOTHING;
long at = 0, seen = 0;
int signal_number = 0, log_descriptor = -1;
std::string watched;
std::recursive_mutex mutex;

template <typename F> F next(const char* name) {
    return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}
#define NEXT(name) static const auto real = next<decltype(&name)>(#name)

std::string link_of(int descriptor) {
    char link[64], path[4096];
    std::snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    const ssize_t length = readlink(link, path, sizeof path);
    return length > 0 ? std::string(path, length) : std::string();
}

std::string absolute(int directory, const char* path) {
    if (!path) return {};
    if (path[0] == '/') return path;
    char here[4096];
    if (directory != AT_FDCWD) return link_of(directory) + "/" + path;
    return std::string(getcwd(here, sizeof here) ? here : "") + "/" + path;
}

bool is_watched(const std::string& path) {
    return action != NOTHING && path.compare(0, watched.size(), watched) == 0;
}

void note(const char* kind, const std::string& path) {
    if (log_descriptor < 0) return;
    static const auto real = next<decltype(&write)>("write");
    const std::string line = std::string(kind) + " " + path.substr(watched.size()) + "\n";
    if (real(log_descriptor, line.data(), line.size()) < 0) std::abort();
}

// Counts a call; true where it is to find the disk full. `half` makes half of it before a kill.
template <typename F> bool due(const char* kind, const std::string& path, bool grows, F half) {
    if (!is_watched(path)) return false;
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    ++seen;
    if (action == LOOK) note(kind, path);
    if (action == FULL && grows && seen >= at) {
        if (seen == at) note(kind, path);
        return true;
    }
    if (seen != at || action == LOOK || action == FULL) return false;
    note(kind, path);
    if (action == SIGNAL) kill(getpid(), signal_number);
    if (action == KILL) {
        half();
        kill(getpid(), SIGKILL);
        pause();
    }
    return false;
}

bool due(const char* kind, const std::string& path, bool grows = false) {
    return due(kind, path, grows, [] {});
}

int refuse() {
    errno = ENOSPC;
    return -1;
}

bool exists(const std::string& path) {
    return faccessat(AT_FDCWD, path.c_str(), F_OK, AT_SYMLINK_NOFOLLOW) == 0;
}

// Counts the making of a directory; true where it is to find the disk full.
bool due_to_make(const std::string& path) { return !exists(path) && due("mkdir", path, true); }

void due_to_remove(const std::string& path) {
    if (exists(path)) due("remove", path);
}

// Returns -1 where a file that is opened may be, or why it may not.
bool may_open(int directory, const char* given, int flags) {
    if (action == NOTHING) return true;
    const std::string path = absolute(directory, given);
    if ((flags & O_ACCMODE) == O_RDONLY && !(flags & (O_CREAT | O_TRUNC))) {
        if (action == LOOK && !(flags & O_DIRECTORY) && is_watched(path)) note("read", path);
        return true;
    }
    const bool is_new = (flags & O_CREAT) && !exists(path);
    return !due(is_new ? "create" : "open", path, is_new);
}

int mode_of(int flags, va_list rest) {
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0;
}

}  // namespace

extern "C" {

void faults_arm(const char* directory, int what, long number, int signal, int log) {
    watched = std::string(directory) + "/";
    at = number, seen = 0, signal_number = signal, log_descriptor = log;
    action = static_cast<Action>(what);
}

long faults_seen() { return seen; }

#define OPEN(name)                                                                                \
    int name(const char* path, int flags, ...) {                                                  \
        NEXT(name);                                                                               \
        va_list rest;                                                                             \
        va_start(rest, flags);                                                                    \
        const int mode = mode_of(flags, rest);                                                    \
        va_end(rest);                                                                             \
        return may_open(AT_FDCWD, path, flags) ? real(path, flags, mode) : refuse();              \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                              \
    int name(int directory, const char* path, int flags, ...) {                                   \
        NEXT(name);                                                                               \
        va_list rest;                                                                             \
        va_start(rest, flags);                                                                    \
        const int mode = mode_of(flags, rest);                                                    \
        va_end(rest);                                                                             \
        return may_open(directory, path, flags) ? real(directory, path, flags, mode) : refuse();  \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                                               \
    FILE* name(const char* path, const char* mode) {                                              \
        NEXT(name);                                                                               \
        const int flags = std::strpbrk(mode, "wa") ? O_WRONLY | O_CREAT : O_RDONLY;               \
        if (may_open(AT_FDCWD, path, flags)) return real(path, mode);                             \
        errno = ENOSPC;                                                                           \
        return nullptr;                                                                           \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int file, const void* data, size_t size) {
    NEXT(write);
    if (action == NOTHING) return real(file, data, size);
    const bool full = due("write", link_of(file), true, [&] { (void)!real(file, data, size / 2); });
    return full ? refuse() : real(file, data, size);
}

ssize_t writev(int file, const iovec* parts, int number) {
    NEXT(writev);
    if (action == NOTHING) return real(file, parts, number);
    const bool full = due("write", link_of(file), true, [&] { (void)!real(file, parts, 1); });
    return full ? refuse() : real(file, parts, number);
}

#define PWRITE(name, offset_type)                                                                 \
    ssize_t name(int file, const void* data, size_t size, offset_type offset) {                   \
        NEXT(name);                                                                               \
        if (action == NOTHING) return real(file, data, size, offset);                             \
        const auto half = [&] { (void)!real(file, data, size / 2, offset); };                     \
        return due("write", link_of(file), true, half) ? refuse()                                 \
                                                       : real(file, data, size, offset);          \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define ON_FILE(name, kind, grows, type)                                                          \
    int name(int file, type length) {                                                             \
        NEXT(name);                                                                               \
        if (action == NOTHING) return real(file, length);                                         \
        return due(kind, link_of(file), grows) ? refuse() : real(file, length);                   \
    }
ON_FILE(ftruncate, "truncate", false, off_t)
ON_FILE(ftruncate64, "truncate", false, off64_t)
ON_FILE(fchmod, "chmod", false, mode_t)

#define SYNC(name)                                                                                \
    int name(int file) {                                                                          \
        NEXT(name);                                                                               \
        if (action != NOTHING) due("sync", link_of(file));                                        \
        return real(file);                                                                        \
    }
SYNC(fsync)
SYNC(fdatasync)

#define ALLOCATE(name, offset_type)                                                               \
    int name(int file, offset_type offset, offset_type length) {                                  \
        NEXT(name);                                                                               \
        if (action != NOTHING && due("allocate", link_of(file), true)) return ENOSPC;             \
        return real(file, offset, length);                                                        \
    }
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)

#define COPY(name, offset_type)                                                                   \
    ssize_t name(int to, int from, offset_type* offset, size_t size) {                            \
        NEXT(name);                                                                               \
        if (action == NOTHING) return real(to, from, offset, size);                               \
        const auto half = [&] { (void)!real(to, from, offset, size / 2); };                       \
        return due("write", link_of(to), true, half) ? refuse() : real(to, from, offset, size);   \
    }
COPY(sendfile, off_t)
COPY(sendfile64, off64_t)

#define REMOVE(name)                                                                              \
    int name(const char* path) {                                                                  \
        NEXT(name);                                                                               \
        if (action != NOTHING) due_to_remove(absolute(AT_FDCWD, path));                           \
        return real(path);                                                                        \
    }
REMOVE(unlink)
REMOVE(rmdir)

int unlinkat(int directory, const char* path, int flags) {
    NEXT(unlinkat);
    if (action != NOTHING) due_to_remove(absolute(directory, path));
    return real(directory, path, flags);
}

int mkdir(const char* path, mode_t mode) {
    NEXT(mkdir);
    const bool full = action != NOTHING && due_to_make(absolute(AT_FDCWD, path));
    return full ? refuse() : real(path, mode);
}

int mkdirat(int directory, const char* path, mode_t mode) {
    NEXT(mkdirat);
    const bool full = action != NOTHING && due_to_make(absolute(directory, path));
    return full ? refuse() : real(directory, path, mode);
}

int chmod(const char* path, mode_t mode) {
    NEXT(chmod);
    if (action != NOTHING) due("chmod", absolute(AT_FDCWD, path));
    return real(path, mode);
}

#define TWO_PATHS(name, kind)                                                                     \
    int name(const char* from, const char* to) {                                                  \
        NEXT(name);                                                                               \
        if (action != NOTHING) due(kind, absolute(AT_FDCWD, to));                                 \
        return real(from, to);                                                                    \
    }
TWO_PATHS(rename, "rename")
TWO_PATHS(link, "link")
TWO_PATHS(symlink, "link")

int renameat(int from_directory, const char* from, int to_directory, const char* to) {
    NEXT(renameat);
    if (action != NOTHING) due("rename", absolute(to_directory, to));
    return real(from_directory, from, to_directory, to);
}

int renameat2(int from_directory, const char* from, int to_directory, const char* to,
              unsigned flags) {
    NEXT(renameat2);
    if (action != NOTHING) due("rename", absolute(to_directory, to));
    return real(from_directory, from, to_directory, to, flags);
}

// What a full disk says when it is asked.
#define STATVFS(name, type)                                                                       \
    int name(const char* path, struct type* found) {                                              \
        NEXT(name);                                                                               \
        const int status = real(path, found);                                                     \
        if (status == 0 && action == FULL && seen >= at) found->f_bavail = found->f_bfree = 0;    \
        return status;                                                                            \
    }
STATVFS(statvfs, statvfs)
STATVFS(statvfs64, statvfs64)

}  // extern "C"
