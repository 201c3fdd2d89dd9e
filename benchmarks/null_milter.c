/* A milter that wants to see everything and changes nothing: null_milter ADDRESS [quiet]. "quiet": it answers nothing but the end of
   the message (SMFIP_NR_*); else each event. Built by benchmarks/filters.py. */

#include <libmilter/mfapi.h>
#include <string.h>

static unsigned long quiet;

static sfsistat answer(void) { return quiet ? SMFIS_NOREPLY : SMFIS_CONTINUE; }
static sfsistat on_connect(SMFICTX *ctx, char *host, _SOCK_ADDR *address) { return answer(); }
static sfsistat on_text(SMFICTX *ctx, char *text) { return answer(); }
static sfsistat on_texts(SMFICTX *ctx, char **texts) { return answer(); }
static sfsistat on_header(SMFICTX *ctx, char *name, char *value) { return answer(); }
static sfsistat on_event(SMFICTX *ctx) { return answer(); }
static sfsistat on_body(SMFICTX *ctx, unsigned char *octets, size_t size) { return answer(); }
static sfsistat on_end(SMFICTX *ctx) { return SMFIS_CONTINUE; }
static sfsistat on_close(SMFICTX *ctx) { return SMFIS_CONTINUE; }

static sfsistat negotiate(SMFICTX *ctx, unsigned long actions, unsigned long steps, unsigned long f2, unsigned long f3,
                          unsigned long *actions_out, unsigned long *steps_out, unsigned long *f2_out, unsigned long *f3_out) {
    *actions_out = 0;
    *steps_out = SMFIP_NOUNKNOWN | (quiet ? steps & quiet : 0);
    *f2_out = *f3_out = 0;
    return SMFIS_CONTINUE;
}

int main(int argc, char **argv) {
    struct smfiDesc filter = {"null", SMFI_VERSION, 0, on_connect, on_text, on_texts, on_texts, on_header, on_event, on_body,
                              on_end, on_close, on_close, NULL, on_event, negotiate};
    if (argc < 2)
        return 64;
    if (argc > 2 && !strcmp(argv[2], "quiet"))
        quiet = SMFIP_NR_CONN | SMFIP_NR_HELO | SMFIP_NR_MAIL | SMFIP_NR_RCPT | SMFIP_NR_DATA | SMFIP_NR_HDR | SMFIP_NR_EOH | SMFIP_NR_BODY;
    smfi_setconn(argv[1]);
    return smfi_register(filter) == MI_FAILURE || smfi_main() == MI_FAILURE;
}
