/*
 * A guest of 512 bytes that checks its memory, for the fastest tests of a migration. Firmware boots it from a disk
 * of a cylinder at least: append zeros.
 *
 * It fills every page from 1 MiB to `top`, then sweeps over them without an end: a page that does not hold what
 * it wrote is reported. Pages below `hot_end` are rewritten in each sweep, all others stay as they are. A page's
 * 1024 words are its address, combined with the number of the sweep, or with COLD.
 *
 * On the serial port: "S 0000001a" when sweep 26 begins, "W 00123000" for a wrong page at 0x123000.
 *
 * The last bytes before the signature are parameters, which a test may change in the image.
 */
        .set COLD, 0xa5a5a5a5
        .set FIRST, 0x100000
        .set PAGE, 0x1000

        .code16
        .globl _start
_start:
        cli
        xorw    %ax, %ax
        movw    %ax, %ds
        inb     $0x92, %al              /* address line 20 */
        orb     $2, %al
        outb    %al, $0x92
        lgdtl   gdt_pointer
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmpl   $8, $protected

        .code32
protected:
        movw    $16, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    $0x7000, %esp
        cld

        xorl    %esi, %esi              /* the number of the sweep */
        movl    $FIRST, %ebx            /* the page */
fill:   call    contents
        call    write
        addl    $PAGE, %ebx
        cmpl    top, %ebx
        jb      fill

sweep:  movb    $'S', %cl
        movl    %esi, %eax
        call    report
        movl    $FIRST, %ebx
check:  call    contents
        movl    $1024, %ecx
        movl    %ebx, %edi
        repe scasl
        je      right
        movb    $'W', %cl
        movl    %ebx, %eax
        call    report
        call    contents
        call    write                   /* so that it is reported once */
right:  cmpl    hot_end, %ebx
        jae     next
        incl    %esi
        call    contents
        call    write
        decl    %esi
        movl    delay, %ecx
        jecxz   next
pause:  pause
        loop    pause
next:   addl    $PAGE, %ebx
        cmpl    top, %ebx
        jb      check
        incl    %esi
        jmp     sweep

/* eax: what each word of page ebx is in sweep esi. */
contents:
        movl    $COLD, %eax
        cmpl    hot_end, %ebx
        jae     cold
        movl    %esi, %eax
cold:   xorl    %ebx, %eax
        ret

/* Fills page ebx with eax. */
write:
        movl    %ebx, %edi
        movl    $1024, %ecx
        rep stosl
        ret

/* Prints the letter cl, and eax in hexadecimal. */
report:
        movl    %eax, %edi
        movb    %cl, %al
        call    put
        movb    $' ', %al
        call    put
        movl    $8, %ecx
digit:  roll    $4, %edi
        movl    %edi, %eax
        andb    $15, %al
        addb    $'0', %al
        cmpb    $'9', %al
        jbe     plain
        addb    $('a' - '9' - 1), %al
plain:  call    put
        loop    digit
        movb    $'\n', %al
put:
        movb    %al, %ah
        movw    $0x3fd, %dx
busy:   inb     %dx, %al
        testb   $0x20, %al
        jz      busy
        movb    %ah, %al
        movw    $0x3f8, %dx
        outb    %al, %dx
        ret

        .align 8
gdt:    .quad   0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdt_pointer:
        .word   . - gdt - 1
        .long   gdt

        .org    498
hot_end: .long  0x1100000               /* 17 MiB */
top:    .long   0x4000000               /* 64 MiB: all RAM of the machine */
delay:  .long   0                       /* passes of an empty loop after each page that is rewritten */
        .word   0xaa55
