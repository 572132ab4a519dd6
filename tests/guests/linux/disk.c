/* Writes to a file system: blocks of one file past the page cache, each read and checked before it is written
   again, and small files through the page cache and the journal. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "load.h"

#define BLOCKS 2048
#define FILES 32
#define FILE_BLOCKS_MAX 8

static const char *folder;
static atomic_int running;

static void *run_blocks(void *unused);
static void *run_files(void *unused);
static void check_block(int file, uint64_t *buffer, uint32_t generation, uint32_t number);
static int write_file(const char *path, uint64_t *buffer, uint32_t generation, uint32_t number);
static int check_file(const char *path, uint64_t *buffer, uint32_t generation, uint32_t number);

void start_disk(const char *in_folder)
{
        folder = in_folder;
        running = 2;
        start_thread(run_blocks, NULL);
        start_thread(run_files, NULL);
}

void end_disk(void)
{
        while (running)
                usleep(5000);
}

static void *run_blocks(void *unused)
{
        static uint32_t generations[BLOCKS];
        char path[256];
        uint64_t *buffer = aligned_alloc(PAGE, PAGE), random = 1, begin_ns = monotonic_ns();
        snprintf(path, sizeof path, "%s/blocks", folder);
        int file = open(path, O_RDWR | O_CREAT | O_DIRECT, 0644);
        if (file < 0 || ftruncate(file, BLOCKS * PAGE)) {
                perror(path);
                exit(1);
        }
        for (unsigned long done = 0; !stopping; done++) {
                uint32_t number = draw(&random) % BLOCKS;
                check_block(file, buffer, generations[number], number);
                fill(buffer, ++generations[number], number);
                if (pwrite(file, buffer, PAGE, (off_t)number * PAGE) != PAGE)
                        counters.wrong_blocks++;
                counters.blocks++;
                check_block(file, buffer, generations[done % BLOCKS], done % BLOCKS);
                keep_rate(begin_ns, done, settings.disk_rate);
        }
        close(file);
        running--;
        return unused;
}

static void check_block(int file, uint64_t *buffer, uint32_t generation, uint32_t number)
{
        if (pread(file, buffer, PAGE, (off_t)number * PAGE) != PAGE || !is_right("block", buffer, generation, number))
                counters.wrong_blocks++;
}

static void *run_files(void *unused)
{
        uint64_t *buffer = malloc(PAGE), begin_ns = monotonic_ns();
        char path[256], new_path[sizeof path + 4];
        for (uint32_t done = 0; !stopping; done++) {
                uint32_t number = done % FILES, generation = done / FILES;
                snprintf(path, sizeof path, "%s/file-%u", folder, number);
                snprintf(new_path, sizeof new_path, "%s.new", path);
                if (generation && !check_file(path, buffer, generation - 1, number))
                        counters.wrong_files++;
                if (!write_file(new_path, buffer, generation, number) || rename(new_path, path))
                        counters.wrong_files++;
                counters.files++;
                keep_rate(begin_ns, done, settings.disk_rate / 10 + 1);
        }
        running--;
        return unused;
}

/* The length of a file changes with its generation. */
static unsigned blocks_of(uint32_t generation, uint32_t number) { return 1 + (generation + number) % FILE_BLOCKS_MAX; }

static int write_file(const char *path, uint64_t *buffer, uint32_t generation, uint32_t number)
{
        int file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644), good = file >= 0;
        fill(buffer, generation, number);
        for (unsigned block = 0; good && block < blocks_of(generation, number); block++)
                good = write(file, buffer, PAGE) == PAGE;
        good = good && !fsync(file);
        return !close(file) && good;
}

static int check_file(const char *path, uint64_t *buffer, uint32_t generation, uint32_t number)
{
        int file = open(path, O_RDONLY), good = file >= 0;
        for (unsigned block = 0; good && block < blocks_of(generation, number); block++)
                good = read(file, buffer, PAGE) == PAGE && is_right("file", buffer, generation, number);
        good = good && read(file, buffer, PAGE) == 0;
        return !close(file) && good;
}
