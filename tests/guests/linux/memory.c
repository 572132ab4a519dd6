/* Rewrites random pages and checks all of them in turn. */
#include <stdlib.h>
#include <sys/mman.h>

#include "load.h"

/* The part of one thread. */
struct part {
        uint32_t first, count; /* pages */
        uint64_t *memory;      /* of all threads */
        uint32_t *generations;
};

static void *run(void *argument);
static void check(const struct part *part, uint32_t page);

void start_memory(void)
{
        uint32_t count = settings.memory_mib * (1024 * 1024 / PAGE), share = count / settings.threads;
        uint64_t *memory = mmap(NULL, (size_t)count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        uint32_t *generations = calloc(count, sizeof *generations);
        if (memory == MAP_FAILED || !generations) {
                say("load: no memory");
                exit(1);
        }
        /* The first quarter stays untouched at first. */
        for (uint32_t page = count / 4; page < count; page++) {
                generations[page] = page % 4;
                fill(memory + page * WORDS, generations[page], page);
        }
        for (unsigned thread = 0; thread < settings.threads; thread++) {
                struct part *part = malloc(sizeof *part);
                *part = (struct part){ thread * share, share, memory, generations };
                start_thread(run, part);
        }
}

static void *run(void *argument)
{
        const struct part *part = argument;
        uint64_t random = part->first + 1, begin_ns = monotonic_ns();
        for (unsigned long done = 0; !stopping; done++) {
                uint32_t page = part->first + draw(&random) % part->count;
                check(part, page);
                fill(part->memory + page * WORDS, ++part->generations[page], page);
                check(part, part->first + done % part->count);
                counters.pages++;
                keep_rate(begin_ns, done, settings.rate / settings.threads);
        }
        return NULL;
}

static void check(const struct part *part, uint32_t page)
{
        uint64_t *block = part->memory + page * WORDS;
        if (is_right("page", block, part->generations[page], page))
                return;
        counters.wrong_pages++;
        fill(block, part->generations[page], page); /* so that it counts once */
}
