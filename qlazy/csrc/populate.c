/* Has the kernel put pages under memory that is about to be filled, until told to stop. */
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

/* `count` stretches of memory, in order; returns how many were finished. */
int64_t qlazy_populate(const uintptr_t *addresses, const int64_t *sizes, int64_t count, const volatile int32_t *stop) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), piece = 2 << 20;
    for (int64_t i = 0; i < count; i++) {
        const uintptr_t end = addresses[i] + (uintptr_t)sizes[i];
        for (uintptr_t at = addresses[i] - addresses[i] % page; at < end; at += piece) {
            if (*stop) return i;
            if (madvise((void *)at, end - at < piece ? end - at : piece, MADV_POPULATE_WRITE)) return i;
        }
    }
    return count;
}
