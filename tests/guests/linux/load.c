/* The load of the Linux guest: rewrites and checks memory and disk, answers over TCP, and prints its counters each
   second. It ends at the line "stop" on its standard input. */
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "load.h"

struct settings settings = { .memory_mib = 64, .rate = 2000, .threads = 2, .disk_rate = 100 };
struct counters counters;
atomic_int stopping;

static void read_settings(void);
static void *await_stop(void *unused);

int main(int count, char **arguments)
{
        read_settings();
        say("load: %u MiB of memory in %u threads", settings.memory_mib, settings.threads);
        start_thread(await_stop, NULL);
        start_memory();
        if (count > 1)
                start_disk(arguments[1]);
        start_echo();
        report_time();
        end_disk();
        say("load: stopped");
        return 0;
}

static void read_settings(void)
{
        char line[4096] = "";
        FILE *file = fopen("/proc/cmdline", "r");
        if (!file || !fgets(line, sizeof line, file))
                return;
        fclose(file);
        for (char *word = strtok(line, " \n"); word; word = strtok(NULL, " \n")) {
                sscanf(word, "sterna.memory=%u", &settings.memory_mib);
                sscanf(word, "sterna.rate=%u", &settings.rate);
                sscanf(word, "sterna.threads=%u", &settings.threads);
                sscanf(word, "sterna.disk-rate=%u", &settings.disk_rate);
        }
}

static void *await_stop(void *unused)
{
        char line[64];
        while (fgets(line, sizeof line, stdin))
                if (!strncmp(line, "stop", 4))
                        stopping = 1;
        return unused;
}

void say(const char *format, ...)
{
        char line[256];
        va_list list;
        va_start(list, format);
        int length = vsnprintf(line, sizeof line - 1, format, list);
        va_end(list);
        if (length > (int)sizeof line - 2)
                length = sizeof line - 2;
        line[length] = '\n';
        if (write(STDOUT_FILENO, line, length + 1) < 0)
                exit(1);
}

void fill(uint64_t *block, uint32_t generation, uint32_t number)
{
        for (unsigned word = 0; word < WORDS; word++)
                block[word] = contents(generation, number, word);
}

int is_right(const char *what, const uint64_t *block, uint32_t generation, uint32_t number)
{
        static atomic_int told;
        for (unsigned word = 0; word < WORDS; word++) {
                uint64_t right = contents(generation, number, word);
                if (block[word] == right)
                        continue;
                if (told++ < 50)
                        say("wrong %s %u, written %u times: word %u is %#llx and not %#llx", what, number, generation,
                            word, (unsigned long long)block[word], (unsigned long long)right);
                return 0;
        }
        return 1;
}

uint64_t monotonic_ns(void)
{
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec * 1000000000ull + now.tv_nsec;
}

void keep_rate(uint64_t begin_ns, unsigned long done, unsigned rate)
{
        while (rate && !stopping && done > (monotonic_ns() - begin_ns) / 1000000 * rate / 1000)
                usleep(5000);
}

void start_thread(void *(*run)(void *), void *argument)
{
        pthread_t thread;
        if (pthread_create(&thread, NULL, run, argument)) {
                say("load: no thread");
                exit(1);
        }
        pthread_detach(thread);
}
