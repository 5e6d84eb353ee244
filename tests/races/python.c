/* python.c: the interpreter, linked with ThreadSanitizer's runtime, which cannot be loaded into one that is not. */
#include <Python.h>

int main(int argc, char **argv) { return Py_BytesMain(argc, argv); }
