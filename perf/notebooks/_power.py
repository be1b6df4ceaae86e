import threading, time, torch, pynvml, sys
from perf.sweep import parse, launch, burst
from flash_attn.cute import flash_attn_func as fa4
pynvml.nvmlInit(); h=pynvml.nvmlDeviceGetHandleByIndex(0)
def monitor(run, secs=1.2):
    s=[];stop=False
    def loop():
        while not stop:
            s.append((pynvml.nvmlDeviceGetClockInfo(h,pynvml.NVML_CLOCK_SM),pynvml.nvmlDeviceGetPowerUsage(h)/1e3)); time.sleep(0.02)
    run(); torch.cuda.synchronize()
    th=threading.Thread(target=loop); th.start(); t0=time.time(); n=0
    while time.time()-t0<secs:
        for _ in range(5): run()
        torch.cuda.synchronize(); n+=5
    el=time.time()-t0
    stop=True; th.join(); s=s[len(s)//2:]
    return el/n, sum(a for a,_ in s)/len(s), sum(b for _,b in s)/len(s)
for d,mask,spec in ((128,"none",["scheduler=dynamic","scheduler=dynamic q_in_registers=True","scheduler=dynamic tile_n=176","scheduler=dynamic q_in_registers=True tile_n=144"]),(64,"none",["scheduler=dynamic tile_m=192"])):
    s=16384;b=1;H=2048//d
    q,k,v=(torch.randn(b,s,H,d,device='cuda',dtype=torch.bfloat16) for _ in range(3)); out=torch.empty_like(q)
    runs=[(sp,launch(parse(sp,d,mask,"bf16")[0],q,k,v,out,False)) for sp in spec]+[("fa4",lambda: fa4(q,k,v))]
    for name,r in runs*2:
        t,c,p=monitor(r)
        print(d,f"{name:45s} {4*s*s*d*H/t/1e12:6.1f} TF  {c:6.0f} MHz {p:5.0f} W  util {4*s*s*d*H/t/(132*4096*c*1e6):.3f}",flush=True)
