/* relaymta-drop OCTETS < MESSAGE: put a message into the drop folder, from which the relay takes it when it is back.
 *
 * sendmail(1) runs it while the relay does not answer. It is set-gid: it alone may write into the folder, which belongs to the
 * relay's user and is closed to all others (mode 0770): the file itself may be read by all, so by the relay. It belongs to whoever runs this, so that the system says who sends.
 * Nothing of the environment is looked at, and the name of the file is chosen here.
 *
 * Standard input is what sendmail/dropping.py writes, of exactly OCTETS octets: of less, nothing is kept. The message is safe on
 * disk when this ends with status 0; else nothing of it is left, but after a kill a file whose name begins with a dot, which the
 * relay removes. It does not take the room that the relay needs to take mail and to work its queue off. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#ifndef FOLDER
#define FOLDER "/var/spool/relaymta/drop"
#endif
#ifndef MOST_OCTETS
#define MOST_OCTETS (1ULL << 30)
#endif
/* The relay takes no mail below a floor of 10 per cent of the file system, 2 GiB at most (disk/room.py); this, below one and a half. */
#define FLOOR_PER_CENT 15
#ifndef FLOOR_MOST
#define FLOOR_MOST (3ULL << 30)
#endif
#define INODES_PER_CENT 2
#define PIECE 65536

enum { OK = 0, USAGE = 64, DATA = 65, CANNOT_CREATE = 73, IO = 74, TEMPFAIL = 75 };

static char piece[PIECE];

static int fail(int status, const char *what)
{
	fprintf(stderr, "relaymta-drop: %s\n", what);
	return status;
}

/* Whether so many octets more leave enough room on the disk. */
static int has_room(int folder, unsigned long long octets)
{
	struct statvfs found;
	if (fstatvfs(folder, &found) != 0)
		return 0;
	unsigned long long size = (unsigned long long)found.f_frsize * found.f_blocks;
	unsigned long long room = (unsigned long long)found.f_frsize * found.f_bavail;
	unsigned long long floor = size / 100 * FLOOR_PER_CENT;
	if (floor > FLOOR_MOST)
		floor = FLOOR_MOST;
	if (found.f_files != 0 && found.f_favail < found.f_files / 100 * INODES_PER_CENT)
		return 0;
	return room >= floor && room - floor >= octets;
}

/* Copy so many octets of standard input; the status. The room is looked at before each piece: others write at the same time. */
static int copy(int folder, int file, unsigned long long octets)
{
	while (octets > 0) {
		if (!has_room(folder, octets))
			return fail(TEMPFAIL, "too little room is left on the disk");
		ssize_t had = read(STDIN_FILENO, piece, octets < PIECE ? octets : PIECE);
		if (had < 0 && errno == EINTR)
			continue;
		if (had < 0)
			return fail(IO, strerror(errno));
		if (had == 0)
			return fail(DATA, "the message is not complete");
		octets -= had;
		for (ssize_t at = 0; at < had;) {
			ssize_t put = write(file, piece + at, had - at);
			if (put < 0 && errno == EINTR)
				continue;
			if (put <= 0)
				return fail(errno == ENOSPC || errno == EDQUOT ? TEMPFAIL : IO, strerror(errno));
			at += put;
		}
	}
	return OK;
}

int main(int count, char **words)
{
	char name[96], *end = NULL;
	struct timespec now;

	/* With one of these closed, the file would get its number, and messages of this program would be written into it. */
	for (int number = STDIN_FILENO; number <= STDERR_FILENO; number++)
		if (fcntl(number, F_GETFD) == -1 && open("/dev/null", O_RDWR) != number)
			return IO;
	if (count != 2 || words[1][0] < '0' || words[1][0] > '9')
		return fail(USAGE, "usage: relaymta-drop OCTETS < MESSAGE");
	errno = 0;
	unsigned long long octets = strtoull(words[1], &end, 10);
	if (errno != 0 || *end != '\0')
		return fail(USAGE, "usage: relaymta-drop OCTETS < MESSAGE");
	if (octets > MOST_OCTETS)
		return fail(DATA, "the message is too large");
	signal(SIGXFSZ, SIG_IGN); /* a limit of the user's: the write fails instead */
	signal(SIGPIPE, SIG_IGN);
	umask(0);
	int folder = open(FOLDER, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (folder < 0)
		return fail(errno == ENOENT || errno == EACCES ? CANNOT_CREATE : TEMPFAIL, FOLDER ": it cannot be opened");
	if (clock_gettime(CLOCK_REALTIME, &now) != 0)
		return fail(TEMPFAIL, strerror(errno));
	snprintf(name, sizeof name, ".%lld.%09ld.%ld.drop", (long long)now.tv_sec, now.tv_nsec, (long)getpid());
	int file = openat(folder, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
	if (file < 0)
		return fail(errno == ENOSPC || errno == EDQUOT ? TEMPFAIL : CANNOT_CREATE, strerror(errno));
	int status = copy(folder, file, octets);
	if (status == OK && (fsync(file) != 0 || close(file) != 0))
		status = fail(IO, strerror(errno));
	if (status == OK && renameat(folder, name, folder, name + 1) != 0)
		status = fail(IO, strerror(errno));
	if (status != OK) {
		unlinkat(folder, name, 0);
		return status;
	}
	if (fsync(folder) != 0) {
		unlinkat(folder, name + 1, 0);
		return fail(IO, strerror(errno));
	}
	return OK;
}
