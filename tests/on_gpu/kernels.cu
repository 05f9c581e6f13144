// What the clients run. Built by nvcc for the GPU that is there; see `client.py` for the launches.

// Bodies of x, y, z and mass: each feels all of them, and moves by one step of time.
// A block walks over all bodies in tiles of its own size, which its threads load together.
// `count` is a multiple of the block's size.
extern "C" __global__ void step(const float4 *from, float4 *to, float4 *velocity, int count, float dt)
{
    extern __shared__ float4 tile[];
    const int me = blockIdx.x * blockDim.x + threadIdx.x;
    const float4 here = from[me];
    float ax = 0, ay = 0, az = 0;
    for (int start = 0; start < count; start += blockDim.x) {
        tile[threadIdx.x] = from[start + threadIdx.x];
        __syncthreads();
#pragma unroll 16
        for (int other = 0; other < blockDim.x; other++) {
            const float4 there = tile[other];
            const float dx = there.x - here.x, dy = there.y - here.y, dz = there.z - here.z;
            // The constant keeps bodies that meet, and a body and itself, apart.
            const float inverse = rsqrtf(dx * dx + dy * dy + dz * dz + 0.01f);
            const float pull = there.w * inverse * inverse * inverse;
            ax += dx * pull;
            ay += dy * pull;
            az += dz * pull;
        }
        __syncthreads();
    }
    float4 speed = velocity[me];
    speed.x += ax * dt;
    speed.y += ay * dt;
    speed.z += az * dt;
    velocity[me] = speed;
    to[me] = make_float4(
        here.x + speed.x * dt, here.y + speed.y * dt, here.z + speed.z * dt, here.w);
}

// Writes where nothing is mapped: an illegal access.
extern "C" __global__ void poke(void)
{
    *(volatile int *)16 = 1;
}
