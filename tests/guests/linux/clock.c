/* Watches the clocks, and prints the counters each second. */
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "load.h"

static int64_t realtime_ahead_ns(int64_t last_ns);

void report_time(void)
{
        uint64_t printed_ns = monotonic_ns(), seen_ns = printed_ns, gap_ns = 0;
        int64_t ahead_ns = realtime_ahead_ns(0), jump_ns = 0;
        for (unsigned long tick = 1; !stopping;) {
                usleep(5000);
                uint64_t now_ns = monotonic_ns();
                int64_t now_ahead_ns = realtime_ahead_ns(ahead_ns);
                if (now_ns - seen_ns > gap_ns)
                        gap_ns = now_ns - seen_ns;
                if (llabs(now_ahead_ns - ahead_ns) > llabs(jump_ns))
                        jump_ns = now_ahead_ns - ahead_ns;
                seen_ns = now_ns;
                ahead_ns = now_ahead_ns;
                if (now_ns - printed_ns < 1000000000)
                        continue;
                say("tick %lu pages=%lu wrong_pages=%lu blocks=%lu wrong_blocks=%lu files=%lu wrong_files=%lu lines=%lu "
                    "gap_ms=%llu jump_ms=%lld",
                    tick++, counters.pages, counters.wrong_pages, counters.blocks, counters.wrong_blocks, counters.files,
                    counters.wrong_files, counters.lines, (unsigned long long)gap_ns / 1000000,
                    (long long)jump_ns / 1000000);
                printed_ns = now_ns;
                gap_ns = 0;
                jump_ns = 0;
        }
}

/* How far CLOCK_REALTIME is ahead of CLOCK_MONOTONIC: constant, unless one is set or jumps. The reading counts only
   where both were read in less than 200 us: the thread may lose its processor in between. */
static int64_t realtime_ahead_ns(int64_t last_ns)
{
        for (int attempt = 0; attempt < 10; attempt++) {
                struct timespec real;
                uint64_t before_ns = monotonic_ns();
                clock_gettime(CLOCK_REALTIME, &real);
                uint64_t after_ns = monotonic_ns();
                if (after_ns - before_ns < 200000)
                        return real.tv_sec * 1000000000ll + real.tv_nsec - (int64_t)before_ns;
        }
        return last_ns;
}
