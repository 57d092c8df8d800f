/* Hide AVX-512, VNNI and AMX from a process, so that libraries take the path of a processor without them.
 *
 *     cc -shared -fPIC -O1 -o avx2_only.so avx2_only.c && LD_PRELOAD=./avx2_only.so program
 *
 * Linux makes the instruction CPUID fail (arch_prctl), and the handler answers it without those bits of leaf 7. */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define BIT(n) (1u << (n))

static long allow(int on) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, on); }

static void answer(int number, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)r[REG_RIP];
    unsigned leaf = (unsigned)r[REG_RAX], part = (unsigned)r[REG_RCX], a, b, c, d;
    (void)info;
    if (code[0] != 0x0f || code[1] != 0xa2) {  /* another fault */
        signal(number, SIG_DFL);
        return;
    }
    allow(1);
    __cpuid_count(leaf, part, a, b, c, d);
    allow(0);
    if (leaf == 7 && part == 0) {
        b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));  /* AVX-512 */
        c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));                                  /* AVX-512 VNNI and such */
        d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));               /* AMX, FP16 */
    }
    if (leaf == 7 && part == 1) {
        a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23));           /* AVX-VNNI, AVX-512 BF16, AMX FP16, AVX-IFMA */
        d &= ~(BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(19));  /* AVX-VNNI-INT8, AVX-NE-CONVERT, AMX-COMPLEX, VNNI-INT16, AVX10 */
    }
    r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d;
    r[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = answer;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, 0);
    if (allow(0)) {
        static const char text[] = "this processor or kernel cannot hide instructions\n";
        (void)!write(2, text, sizeof text - 1);
        _exit(3);
    }
}
