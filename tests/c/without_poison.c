/* without_poison: linked in with --wrap=uffd_poison, it is a kernel that does not know UFFDIO_POISON. */
#include <errno.h>
#include "uffd.h"

int __wrap_uffd_poison(int uffd, uint64_t addr, uint64_t length, uint64_t *donep);

int __wrap_uffd_poison(int uffd, uint64_t addr, uint64_t length, uint64_t *donep)
{
    (void)uffd;
    (void)addr;
    (void)length;
    *donep = 0;
    return -EINVAL;
}
