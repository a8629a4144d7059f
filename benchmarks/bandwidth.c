// Bandwidth of memory: THREADS threads, each with its share of one buffer, fill it for the first time, which has the kernel put
// fresh pages under it, and then sum it with loads as wide as the compiler has.
//
//     cc -O3 -march=native -pthread bandwidth.c -o bandwidth && ./bandwidth MIB THREADS
//
// Prints GB/s of the first fill, and of the best of ten passes. The buffer has to be larger than the last-level cache, as a model is.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { PASSES = 10, STREAMS = 8, LANES = 32 };

typedef struct {
    uint64_t *data;
    size_t words;
    uint64_t sum;
    pthread_barrier_t *barrier;
} Share;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Several places at once, so that the processor's prefetchers have several streams to follow, as a product of rows has.
static uint64_t sum(const uint64_t *data, size_t words) {
    uint64_t total[LANES] = {0};
    size_t part = words / STREAMS;
    for (size_t i = 0; i + LANES <= part; i += LANES)
        for (int s = 0; s < STREAMS; s++) {
            const uint64_t *at = data + s * part + i;
            for (int lane = 0; lane < LANES; lane++) total[lane] += at[lane];
        }
    uint64_t all = 0;
    for (int lane = 0; lane < LANES; lane++) all += total[lane];
    return all;
}

static void *work(void *argument) {
    Share *share = argument;
    pthread_barrier_wait(share->barrier);
    memset(share->data, 1, share->words * 8);
    pthread_barrier_wait(share->barrier);
    for (int pass = 0; pass < PASSES; pass++) {
        pthread_barrier_wait(share->barrier);
        share->sum += sum(share->data, share->words);
        pthread_barrier_wait(share->barrier);
    }
    return NULL;
}

int main(int count, char **words) {
    if (count != 3) return 2;
    size_t bytes = (size_t)atol(words[1]) << 20;
    int threads = atoi(words[2]);
    uint64_t *data;
    if (threads < 1 || posix_memalign((void **)&data, 2 << 20, bytes)) return 1;
    madvise(data, bytes, MADV_HUGEPAGE);
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, NULL, threads + 1);
    pthread_t *ids = calloc(threads, sizeof *ids);
    Share *shares = calloc(threads, sizeof *shares);
    size_t each = bytes / 8 / threads;
    for (int i = 0; i < threads; i++) {
        shares[i] = (Share){data + i * each, each, 0, &barrier};
        pthread_create(&ids[i], NULL, work, &shares[i]);
    }
    pthread_barrier_wait(&barrier);
    double start = now();
    pthread_barrier_wait(&barrier);
    double fresh = now() - start, best = 1e9;
    for (int pass = 0; pass < PASSES; pass++) {
        pthread_barrier_wait(&barrier);
        start = now();
        pthread_barrier_wait(&barrier);
        double took = now() - start;
        if (took < best) best = took;
    }
    uint64_t check = 0;
    for (int i = 0; i < threads; i++) {
        pthread_join(ids[i], NULL);
        check += shares[i].sum;
    }
    fprintf(stderr, "%llu\n", (unsigned long long)check);
    printf("%.3f %.3f\n", 8.0 * each * threads / fresh / 1e9, 8.0 * each * threads / best / 1e9);
    return 0;
}
