// SPDX-License-Identifier: Apache-2.0

package agent

/*
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

// The mark says that what runs is the copy. It is taken out of the environment by
// the Go half.
#define MARK "PEERPOD_SEALED=1"

// seal runs PID 1 from a sealed copy of its own file in memory.
//
// libcontainer runs this binary again for every container process and lets it be
// seen by the container, so it must be one that nobody can write to: failing that it
// makes a fresh copy each time. One sealed copy for the agent and all its children
// saves that, and under emulation far more: the translations of the code belong to
// physical pages, which are then the same ones.
//
// It runs before the Go runtime, because starting that twice would cost more than is
// won. There is no /proc yet. Whatever fails leaves things as they were.
__attribute__((constructor)) static void seal(int argc, char **argv, char **envp)
{
	struct stat st;
	off_t done = 0;
	int n = 0, exe, mem;
	char **env;

	if (getpid() != 1 || argc < 1 || argv[0][0] != '/' || getenv("_LIBCONTAINER_INITPIPE") || getenv("PEERPOD_SEALED"))
		return;
	exe = open(argv[0], O_RDONLY | O_CLOEXEC);
	if (exe < 0)
		return;
	mem = memfd_create("podvmd", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (mem < 0 || fstat(exe, &st) < 0)
		goto out;
	while (done < st.st_size)
		if (sendfile(mem, exe, &done, st.st_size - done) <= 0)
			goto out;
	if (fchmod(mem, 0555) < 0 ||
	    fcntl(mem, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) < 0)
		goto out;
	while (envp[n])
		n++;
	env = calloc(n + 2, sizeof(char *));
	if (!env)
		goto out;
	memcpy(env, envp, n * sizeof(char *));
	env[n] = MARK;
	syscall(SYS_execveat, mem, "", argv, env, AT_EMPTY_PATH);
	free(env);
out:
	close(exe);
	if (mem >= 0)
		close(mem);
}
*/
import "C"

import "os"

func init() { _ = os.Unsetenv("PEERPOD_SEALED") }
