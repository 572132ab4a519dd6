/* Answers each line that comes over TCP with its number within the connection, and the line. */
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "load.h"

#define PORT 7777

static void *run(void *unused);
static void *serve(void *argument);

void start_echo(void)
{
        start_thread(run, NULL);
}

static void *run(void *unused)
{
        struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(PORT) };
        int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
        setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 16)) {
                perror("load: no TCP");
                return unused;
        }
        for (;;) {
                FILE *connection = fdopen(accept(listener, NULL, NULL), "r+");
                if (connection)
                        start_thread(serve, connection);
        }
}

static void *serve(void *argument)
{
        FILE *connection = argument;
        char line[256];
        for (unsigned long number = 1; fgets(line, sizeof line, connection); number++) {
                counters.lines++;
                /* A stream that was read must be positioned before it is written, which a socket cannot be. */
                if (dprintf(fileno(connection), "%lu %s", number, line) < 0)
                        break;
        }
        fclose(connection);
        return NULL;
}
