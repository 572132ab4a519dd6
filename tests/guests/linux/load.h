/* What the parts of the load share: settings, counters, and the contents that they write and check. */
#ifndef LOAD_H
#define LOAD_H

#include <stdatomic.h>
#include <stdint.h>

#define PAGE 4096
#define WORDS (PAGE / sizeof(uint64_t))

/* From the kernel's command line, as sterna.NAME=NUMBER. */
struct settings {
        unsigned memory_mib; /* memory that is checked */
        unsigned rate;       /* pages rewritten a second; 0: as many as possible */
        unsigned threads;    /* that do so */
        unsigned disk_rate;  /* blocks rewritten a second; 0: as many as possible */
};

struct counters {
        atomic_ulong pages;        /* rewritten */
        atomic_ulong wrong_pages;
        atomic_ulong blocks;       /* of the disk, rewritten past the page cache */
        atomic_ulong wrong_blocks; /* and failed calls */
        atomic_ulong files;        /* written and read again */
        atomic_ulong wrong_files;  /* and failed calls */
        atomic_ulong lines;        /* answered over TCP */
};

extern struct settings settings;
extern struct counters counters;
extern atomic_int stopping;

/* Each starts its threads. */
void start_memory(void);
void start_disk(const char *folder);
void start_echo(void);

/* Waits for the threads that write to the disk. */
void end_disk(void);

/* Prints a line each second until `stopping`. */
void report_time(void);

/* Whole lines, so that threads do not mix them. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The 8 bytes at `word` of the block `number`, after it was written `generation` times. Every fourth generation is
   zeros: a migration sends such pages another way. */
static inline uint64_t contents(uint32_t generation, uint32_t number, unsigned word)
{
        if (generation % 4 == 0)
                return 0;
        return (generation * 0x9e3779b97f4a7c15ull) ^ (number * 0xc2b2ae3d27d4eb4full) ^ word;
}

/* Fills a block. */
void fill(uint64_t *block, uint32_t generation, uint32_t number);

/* Whether a block is right; says what is wrong otherwise. */
int is_right(const char *what, const uint64_t *block, uint32_t generation, uint32_t number);

/* The next of a row of random numbers. */
static inline uint32_t draw(uint64_t *state)
{
        *state = *state * 6364136223846793005ull + 1442695040888963407ull;
        return *state >> 33;
}

/* Sleeps while more was done since `begin_ns` than the rate allows. */
void keep_rate(uint64_t begin_ns, unsigned long done, unsigned rate);
uint64_t monotonic_ns(void);

void start_thread(void *(*run)(void *), void *argument);

#endif
