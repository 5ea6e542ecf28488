/* error: what a return value of the core means. Said once, here.
 *
 *   0          done
 *   negative   fatal: a negative errno, forwarded to the caller unchanged
 *   positive   a named condition of that one function, handled by its caller, never forwarded
 *
 * Python has one check(rc) for the first two (pcshare/errors.py). Functions that make an fd return it (>= 0).
 */
#ifndef PCSHARE_ERROR_H
#define PCSHARE_ERROR_H

enum { CORE_ERROR_TEXT_MAX = 256 };

#endif
