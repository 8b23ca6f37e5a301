"""Numbers of system calls on x86_64 and aarch64 (NAME:X86_64/AARCH64, "-" where there is none), from Linux's headers.

Those of aarch64 are the generic table, include/uapi/asm-generic/unistd.h.
"""

Numbers = tuple[int | None, int | None]
NEWEST = 463  # the last number known when this was written; later ones are the same on both


def _table(text: str) -> dict[str, Numbers]:
    def number(digits: str) -> int | None:
        return None if digits == "-" else int(digits)

    entries = (entry.partition(":") for entry in text.split())
    return {name: (number(pair.split("/")[0]), number(pair.split("/")[1])) for name, _, pair in entries}


ALLOWED = _table("""
read:0/63 write:1/64 close:3/57 fstat:5/80 lseek:8/62 mmap:9/222 mprotect:10/226 munmap:11/215 brk:12/214
mremap:25/216 madvise:28/233 readv:19/65 writev:20/66 pread64:17/67 pwrite64:18/68 dup:32/23 dup2:33/- dup3:292/24
pipe:22/- pipe2:293/59 flock:73/32 fsync:74/82 fdatasync:75/83 ftruncate:77/46 getdents64:217/61 fallocate:285/47
fadvise64:221/223 sendfile:40/71 copy_file_range:326/285 newfstatat:262/79 stat:4/- lstat:6/- statx:332/291
access:21/- faccessat:269/48 faccessat2:439/439 readlink:89/- readlinkat:267/78 getcwd:79/17 chdir:80/49 fchdir:81/50
statfs:137/43 fstatfs:138/44 umask:95/166 rt_sigaction:13/134 rt_sigprocmask:14/135 rt_sigreturn:15/139
rt_sigsuspend:130/133 rt_sigpending:127/136 rt_sigtimedwait:128/137 sigaltstack:131/132 pause:34/- alarm:37/-
getitimer:36/102 setitimer:38/103 nanosleep:35/101 clock_nanosleep:230/115 clock_gettime:228/113 clock_getres:229/114
gettimeofday:96/169 time:201/- times:100/153 getrusage:98/165 sysinfo:99/179 uname:63/160 getrandom:318/278
select:23/- pselect6:270/72 poll:7/- ppoll:271/73 epoll_create:213/- epoll_create1:291/20 epoll_ctl:233/21
epoll_wait:232/- epoll_pwait:281/22 eventfd2:290/19 futex:202/98 set_robust_list:273/99 set_tid_address:218/96
rseq:334/293 membarrier:324/283 sched_yield:24/124 sched_getaffinity:204/123 getcpu:309/168 restart_syscall:219/128
arch_prctl:158/- gettid:186/178 getpid:39/172 getppid:110/173 getuid:102/174 geteuid:107/175 getgid:104/176
getegid:108/177 getresuid:118/148 getresgid:120/150 getgroups:115/158 getpgid:121/155 getpgrp:111/- getsid:124/156
getrlimit:97/163 exit:60/93 exit_group:231/94 wait4:61/260 waitid:247/95 recvfrom:45/207 shutdown:48/210
setrlimit:160/164
""")

CHANGE_FILES = _table("""
mkdir:83/- mkdirat:258/34 rmdir:84/- unlink:87/- unlinkat:263/35 rename:82/- renameat:264/38 renameat2:316/276
symlink:88/- symlinkat:266/36
""")

# whether these are allowed depends on their arguments
LOOKED_INTO = _table("""
clone:56/220 clone3:435/435 open:2/- openat:257/56 openat2:437/437 kill:62/129 tgkill:234/131 prlimit64:302/261
fcntl:72/25 ioctl:16/29 prctl:157/167 socketpair:53/199 sendto:44/206
""")
