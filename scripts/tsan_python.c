/* tsan_python: the interpreter, linked with the thread sanitizer. A module that is built with it cannot be loaded into
 * any other; preloading the sanitizer instead would put it into every program that a test starts, nbdkit and QEMU too.
 */
#include <Python.h>

int main(int argc, char **argv)
{
    return Py_BytesMain(argc, argv);
}
