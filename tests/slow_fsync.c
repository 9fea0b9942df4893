/* Preloaded into a server under test: each fsync and fdatasync takes DELAY ms longer, and is noted.
 *
 * A line of the file named by SYNC_LOG: inode, size of the file when the call began, moment at
 * which it returned (ns of CLOCK_MONOTONIC). Written before the call returns, so that who sees an
 * answer of the server sees the line of each sync that the answer may rely on. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static int synced(const char *name, int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    const char *log_path = getenv("SYNC_LOG"), *delay_ms = getenv("SYNC_DELAY_MS");
    struct stat before = {0};
    fstat(fd, &before);
    int result = real(fd);
    if (log_path == NULL || !S_ISREG(before.st_mode)) return result;
    long ms = delay_ms ? atol(delay_ms) : 0;
    struct timespec pause = {ms / 1000, ms % 1000 * 1000000L}, now;
    nanosleep(&pause, NULL);
    clock_gettime(CLOCK_MONOTONIC, &now);
    char line[96];
    int length = snprintf(line, sizeof line, "%lu %lld %lld\n", (unsigned long)before.st_ino,
                          (long long)before.st_size, now.tv_sec * 1000000000LL + now.tv_nsec);
    int file = open(log_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (file >= 0) {
        if (result == 0 && write(file, line, length) != length) abort();
        close(file);
    }
    return result;
}

int fsync(int fd) { return synced("fsync", fd); }
int fdatasync(int fd) { return synced("fdatasync", fd); }
